"""Who answers in `tests.bench.real`: each in a process of its own, so that memory and start count.

    python -m tests.bench.real_contenders KIND MODEL

loads MODEL (a .gguf file, or a folder of safetensors for those who read no other), prints one JSON
line when it is ready, and then answers lines `{"prompts": [[token ids], ...], "num_tokens": N}`,
all prompts at once, by the seconds to the first token and to the last.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from models.engines.base import Engine, GenerationRequest

Prompts: TypeAlias = list[list[int]]
Answer: TypeAlias = Callable[[Prompts, int], tuple[float, float]]
"""Answers all prompts at once with so many tokens each; seconds to first and last."""

MOST_AT_ONCE, CONTEXT_TOKENS = 32, 2304
KV_BYTES = 2 * 2**30
_ids = count()


def engine(kind: str, model: Path, stack: ExitStack, *, dtype: str = "auto") -> Answer:
    """One of Shoal's engines, asked directly."""
    options: dict[str, Any] = {}
    if kind == "llamacpp":
        options = {
            "num_slots": MOST_AT_ONCE,
            "context_tokens": CONTEXT_TOKENS,
            "prompt_cache_mib": 0,
            "polling": dtype != "asleep",
        }
        dtype = "auto"
    runner, running = start_engine(kind, [model], stack, dtype, options)

    async def one(prompt: list[int], num_tokens: int) -> float:
        first_s = 0.0
        async for chunk in running.generate(greedy(prompt, num_tokens)):
            if chunk.tokens and not first_s:
                first_s = time.perf_counter()
        return first_s

    async def all_of(prompts: Prompts, num_tokens: int) -> float:
        return max(await asyncio.gather(*(one(prompt, num_tokens) for prompt in prompts)))

    return lambda prompts, num_tokens: _timed(lambda: runner.run(all_of(prompts, num_tokens)))


def greedy(prompt: list[int], num_tokens: int) -> GenerationRequest:
    """A request of the first model for so many of the likeliest tokens."""
    from models.engines.base import GenerationRequest, SamplingOptions

    return GenerationRequest(
        request_id=str(next(_ids)),
        prompt_tokens=tuple(prompt),
        members=("m0",),
        sampling=SamplingOptions(max_tokens=num_tokens, temperature=0, ignore_eos=True),
    )


def start_engine(
    kind: str,
    models: list[Path],
    stack: ExitStack,
    dtype: str,
    options: dict[str, Any],
    leads: tuple[str, ...] = (),
) -> tuple[asyncio.Runner, Engine]:
    """Return an engine that runs models named m0, m1, ..., with the loop that it runs in.

    Some of them may be the others' `leads`.
    """
    from models.card import read_card
    from models.engines.registry import create_engine
    from models.spec import EngineSpec, Model, ModelSpec

    spec = EngineSpec.model_validate(
        {"name": "e", "kind": kind, "dtype": dtype, "kv_memory_bytes": KV_BYTES}
        | {"leads": leads, "options": options}
    )
    served = [
        Model(
            spec=ModelSpec(name=f"m{index}", engine="e", checkpoint=str(model)),
            card=read_card(model),
            tokenizer=model,
        )
        for index, model in enumerate(models)
    ]
    runner = stack.enter_context(asyncio.Runner())
    running = create_engine(spec, served)
    runner.run(running.start())
    stack.callback(lambda: runner.run(running.stop()))
    return runner, running


def loss_per_token(folder: Path, stack: ExitStack, windows: Prompts, *, dtype: str) -> float:
    """Return what the stacked engine's weights as `dtype` say of texts, in nats per token."""
    from models.engines.base import SamplingOptions

    runner, running = start_engine("stacked", [folder], stack, dtype, {})
    told_only = SamplingOptions(max_tokens=1, prompt_logprobs=0)

    async def logprobs(prompt: list[int]) -> list[float]:
        request = replace(greedy(prompt, 1), sampling=told_only)
        return [
            token.logprob
            async for chunk in running.generate(request)
            for token in chunk.prompt
            if token.logprob is not None
        ]

    told = [value for prompt in windows for value in runner.run(logprobs(prompt))]
    return -sum(told) / len(told)


def transformers(model: Path, *, dtype: str) -> Answer:
    """`generate`, prompts of one length in one batch."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).to(device)

    class First(BaseStreamer):
        """Notes when the first token comes; the prompt comes before it."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: object) -> None:
            """Note the time."""
            self.times.append(time.perf_counter())

        def end(self) -> None:
            """Nothing to do."""

    def answer(prompts: Prompts, num_tokens: int) -> tuple[float, float]:
        ids = torch.tensor(prompts, device=device)
        first = First()

        def run() -> float:
            loaded.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=False,
                pad_token_id=0,
                # A streamer takes one prompt only; of several only the end is told.
                streamer=first if len(prompts) == 1 else None,
            )
            return first.times[1] if first.times else time.perf_counter()

        return _timed(run)

    return answer


def vllm(model: Path) -> Answer:
    """vLLM on CPU, its engine's steps taken in this process."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(model),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=CONTEXT_TOKENS,
        max_num_seqs=MOST_AT_ONCE,
        kv_cache_memory_bytes=KV_BYTES,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    ).llm_engine

    def answer(prompts: Prompts, num_tokens: int) -> tuple[float, float]:
        def run() -> float:
            first_s = 0.0
            params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
            for prompt in prompts:
                llm.add_request(str(next(_ids)), {"prompt_token_ids": prompt}, params)
            while llm.has_unfinished_requests():
                if llm.step() and not first_s:
                    first_s = time.perf_counter()
            return first_s

        return _timed(run)

    return answer


def llama_server(model: Path, port: int) -> None:
    """llama.cpp's own server as it comes, on a loopback port, until stdin ends."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = MOST_AT_ONCE
    params.n_ctx = MOST_AT_ONCE * CONTEXT_TOKENS
    params.cache_ram_mib = 0
    params.verbosity = 1
    server = xllamacpp.Server(params)
    print(json.dumps({"ready": True}), flush=True)
    sys.stdin.read()
    del server


def _timed(run: Callable[[], float]) -> tuple[float, float]:
    """Return when `run` says that the first token came, and when it ended, from its start."""
    started_s = time.perf_counter()
    first_s = run()
    return first_s - started_s, time.perf_counter() - started_s


def main() -> None:
    """Command line; see the module's docstring."""
    kind, model = sys.argv[1], Path(sys.argv[2])
    if kind == "llama-server":
        llama_server(model, int(sys.argv[3]))
        return
    library, _, dtype = kind.partition("-")
    with ExitStack() as stack:
        if library == "transformers":
            answer = transformers(model, dtype=dtype)
        elif library == "vllm":
            answer = vllm(model)
        else:
            answer = engine(library, model, stack, dtype=dtype or "auto")
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            first_s, total_s = answer(asked["prompts"], asked["num_tokens"])
            print(json.dumps({"first_s": first_s, "total_s": total_s}), flush=True)


if __name__ == "__main__":
    main()
