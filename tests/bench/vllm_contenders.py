"""Engines that answer the same requests side by side, each in this process.

Calling a contender with a number of requests answers them at once and returns the seconds until
every one has its first token, and until all are done.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from models.card import read_card
from models.engines.base import GenerationRequest, SamplingOptions
from models.engines.registry import create_engine
from models.spec import EngineSpec, Model, ModelSpec

_ids = count()


class Contender(Protocol):
    """See the module's docstring."""

    def __call__(self, num_requests: int) -> tuple[float, float]:
        """Answer so many requests at once."""
        ...

    def stop(self) -> None:
        """Free what it holds."""
        ...


class VllmContender:
    """One or several vLLM engines in this process; several take their steps in turn."""

    def __init__(
        self,
        folders: Sequence[Path],
        num_tokens: int,
        *,
        dtype: str,
        compiled: bool,
        max_requests: int,
        kv_bytes: int,
        **options: Any,
    ) -> None:
        import vllm

        self._num_tokens = num_tokens
        settings = {"enable_prefix_caching": False, **options}
        self.engines: list[Any] = [
            vllm.LLM(
                str(folder),
                dtype=dtype,
                enforce_eager=not compiled,
                max_model_len=512,
                max_num_seqs=max_requests,
                kv_cache_memory_bytes=kv_bytes,
                skip_tokenizer_init=True,
                **settings,
            ).llm_engine
            for folder in folders
        ]

    def __call__(self, num_requests: int) -> tuple[float, float]:
        """Answer."""
        from vllm import SamplingParams

        started_s = time.perf_counter()
        for engine in self.engines:
            for place in range(num_requests):
                engine.add_request(
                    f"bench-{next(_ids)}",
                    {"prompt_token_ids": prompt_tokens(place)},
                    SamplingParams(temperature=0, max_tokens=self._num_tokens, ignore_eos=True),
                )
        first_s = None
        while any(engine.has_unfinished_requests() for engine in self.engines):
            outputs = [engine.step() for engine in self.engines]
            if first_s is None and all(outputs):
                first_s = time.perf_counter() - started_s
        assert first_s is not None
        return first_s, time.perf_counter() - started_s

    def stop(self) -> None:
        """Free the engines."""
        for engine in self.engines:
            engine.engine_core.shutdown()


class AveragedContender:
    """The engines of another contender in lock-step, distributions averaged at every token.

    vLLM takes no token from outside, so each token is a request of its own to every engine, which
    finds what came before in its prefix cache and returns all log-probabilities.
    """

    def __init__(self, others: VllmContender, num_tokens: int) -> None:
        self._engines = others.engines
        self._num_tokens = num_tokens

    def stop(self) -> None:
        """Nothing is its own."""

    def __call__(self, num_requests: int) -> tuple[float, float]:
        """Answer."""
        started_s = time.perf_counter()
        # Another first token every time: no earlier call's blocks are found.
        texts = [[next(_ids) % 500, *prompt_tokens(place)[1:]] for place in range(num_requests)]
        first_s = None
        for _ in range(self._num_tokens):
            for text, token in zip(texts, self._next_tokens(texts), strict=True):
                text.append(token)
            first_s = first_s or time.perf_counter() - started_s
        assert first_s is not None
        return first_s, time.perf_counter() - started_s

    def _next_tokens(self, texts: Sequence[list[int]]) -> list[int]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, flat_logprobs=True)
        place_of: dict[str, int] = {}
        for engine in self._engines:
            for place, text in enumerate(texts):
                name = f"bench-{next(_ids)}"
                place_of[name] = place
                engine.add_request(name, {"prompt_token_ids": text}, sampling)
        probs_RV: Any = 0
        while any(engine.has_unfinished_requests() for engine in self._engines):
            for engine in self._engines:
                for output in engine.step():
                    found = output.outputs[0].logprobs
                    if isinstance(probs_RV, int):
                        probs_RV = np.zeros((len(texts), max(found.token_ids) + 1))
                    row_V = probs_RV[place_of[output.request_id]]
                    row_V[found.token_ids] += np.exp(found.logprobs)
        tokens: list[int] = probs_RV.argmax(1).tolist()
        return tokens


class StackedContender:
    """Shoal's own engine through its public interface."""

    def __init__(
        self,
        folders: Sequence[Path],
        num_tokens: int,
        runner: asyncio.Runner,
        *,
        device: str,
        dtype: Any,
        kv_bytes: int,
    ) -> None:
        self._num_tokens = num_tokens
        self._runner = runner
        self._engine = create_engine(
            EngineSpec(
                name="bench", kind="stacked", device=device, dtype=dtype, kv_memory_bytes=kv_bytes
            ),
            [
                Model(
                    spec=ModelSpec(name=folder.name, engine="bench", checkpoint=folder.name),
                    card=read_card(folder),
                )
                for folder in folders
            ],
        )
        runner.run(self._engine.start())

    def __call__(self, num_requests: int) -> tuple[float, float]:
        """Answer."""
        return self._runner.run(self._answer(num_requests))

    def stop(self) -> None:
        """Free the engine."""
        self._runner.run(self._engine.stop())

    async def _answer(self, num_requests: int) -> tuple[float, float]:
        started_s = time.perf_counter()

        async def read(place: int) -> float:
            first_s = 0.0
            request = GenerationRequest(
                request_id=f"bench-{next(_ids)}",
                prompt_tokens=tuple(prompt_tokens(place)),
                members=self._engine.members,
                sampling=SamplingOptions(
                    temperature=0.0, max_tokens=self._num_tokens, ignore_eos=True
                ),
            )
            async for _ in self._engine.generate(request):
                first_s = first_s or time.perf_counter() - started_s
            return first_s

        firsts_s = await asyncio.gather(*(read(place) for place in range(num_requests)))
        return max(firsts_s), time.perf_counter() - started_s


def prompt_tokens(place: int) -> list[int]:
    """32 tokens, others for every place."""
    return [5 + (7 * place + i) % 200 for i in range(32)]
