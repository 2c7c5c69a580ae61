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

from models.card import read_card
from models.engines.base import GenerationRequest, SamplingOptions
from models.engines.registry import create_engine
from models.pool import EngineSpec, Model, ModelSpec

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
    ) -> None:
        import vllm

        self._num_tokens = num_tokens
        self._engines: list[Any] = [
            vllm.LLM(
                str(folder),
                dtype=dtype,
                enforce_eager=not compiled,
                max_model_len=512,
                max_num_seqs=max_requests,
                kv_cache_memory_bytes=kv_bytes,
                enable_prefix_caching=False,
                skip_tokenizer_init=True,
            ).llm_engine
            for folder in folders
        ]

    def __call__(self, num_requests: int) -> tuple[float, float]:
        """Answer."""
        from vllm import SamplingParams

        started_s = time.perf_counter()
        for engine in self._engines:
            for place in range(num_requests):
                engine.add_request(
                    f"bench-{next(_ids)}",
                    {"prompt_token_ids": prompt_tokens(place)},
                    SamplingParams(temperature=0, max_tokens=self._num_tokens, ignore_eos=True),
                )
        first_s = None
        while any(engine.has_unfinished_requests() for engine in self._engines):
            outputs = [engine.step() for engine in self._engines]
            if first_s is None and all(outputs):
                first_s = time.perf_counter() - started_s
        assert first_s is not None
        return first_s, time.perf_counter() - started_s

    def stop(self) -> None:
        """Free the engines."""
        for engine in self._engines:
            engine.engine_core.shutdown()


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
