"""Gated fusion whose lead runs alone: the tokens of running everybody, for less work."""

import asyncio
import math
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from models.engines.base import Chunk, Engine, GenerationRequest
from models.engines.stacked.cache import BLOCK_TOKENS
from models.engines.stacked.runner import Runner
from tests.models.engines.stacked.tiny import (
    VOCAB_SIZE,
    answer,
    build_engine,
    read,
    request,
    running,
    save_checkpoint,
    token_ids,
)

PROMPT = list(range(20, 20 + 3 * BLOCK_TOKENS))
MEMBERS = ("m2", "m0", "m1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three random checkpoints, sure of some tokens and not of others."""
    root = tmp_path_factory.mktemp("lead")
    return [save_checkpoint(root / f"{s}", seed=s) for s in range(3)]


def gated(
    prompt: Seq[int], members: Seq[str] = MEMBERS, *, gate: float, **options: Any
) -> GenerationRequest:
    """A request that fuses where its first member is unsure."""
    weights = tuple(range(1, len(members) + 1))
    wanted = request(prompt, members, rule="gated", weights=weights, ignore_eos=True, **options)
    return replace(wanted, gate=gate)


def everybody(wanted: GenerationRequest) -> GenerationRequest:
    """The same with what makes all members compute prompt and answer: the prompt is read."""
    return replace(wanted, sampling=replace(wanted.sampling, prompt_logprobs=0))


@pytest.fixture(name="rows")
def counted_rows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The members and tokens of every part of every step, once the engine has started."""
    rows: list[tuple[int, int]] = []
    step = Runner.step

    def counting(self: Runner, parts: Any) -> Any:
        rows.extend((part.num_lanes, part.num_tokens) for part in parts)
        return step(self, parts)

    monkeypatch.setattr(Runner, "step", counting)
    return rows


requests = st.builds(
    gated,
    st.lists(st.integers(2, VOCAB_SIZE - 1), min_size=1, max_size=60),
    st.permutations(MEMBERS).flatmap(lambda m: st.sampled_from([m, m[:2]])),
    gate=st.sampled_from([0.0, 0.1, 0.2, 0.5, 0.99]),
    temperature=st.sampled_from([0.0, 1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 99),
    max_tokens=st.integers(1, 24),
    top_logprobs=st.just(3),
)


# Shrinking would run into the test's time limit.
@settings(max_examples=10, phases=[Phase.explicit, Phase.generate])
@given(wanted=st.lists(requests, min_size=1, max_size=5), step_rows=st.sampled_from([8, 64, 2048]))
def test_tokens_are_those_of_computing_everybody_at_every_token(
    folders: list[Path], wanted: list[GenerationRequest], step_rows: int
) -> None:
    """Whatever the gates, members, seeds and penalties, in one batch, with small steps and large
    ones: the tokens, and what is told of them.
    """
    alone = answer(build_engine(folders, step_rows=step_rows), *wanted)
    all_of_them = answer(build_engine(folders, prefix_cache=False), *map(everybody, wanted))
    assert [token_ids(one) for one in alone] == [token_ids(one) for one in all_of_them]
    for one, other in zip(alone, all_of_them, strict=True):
        assert logprobs(one) == pytest.approx(logprobs(other), abs=1e-4)


def logprobs(chunks: Seq[Chunk]) -> list[float]:
    """The log-probabilities of an answer's tokens and of their best alternatives."""
    tokens = [token for chunk in chunks for token in chunk.tokens]
    told = [[token.logprob, *(top.logprob for top in token.top)] for token in tokens]
    return [value for values in told for value in values if value is not None]


def test_a_sure_lead_runs_alone(folders: list[Path], rows: list[tuple[int, int]]) -> None:
    """With a gate that it always passes nobody else computes anything, not even the prompt."""
    engine = build_engine(folders)

    async def run() -> tuple[int, int]:
        async with running(engine):
            rows.clear()
            await read(engine, gated(PROMPT, gate=0.0, max_tokens=5))
            return engine.stats().gated_tokens_total, engine.stats().fused_tokens_total

    assert asyncio.run(run()) == (5, 0)
    assert rows == [(1, len(PROMPT)), (1, 1), (1, 1), (1, 1), (1, 1)]


def test_the_others_catch_up_in_one_pass(folders: list[Path], rows: list[tuple[int, int]]) -> None:
    """Each token at which they are asked costs them one part of a step, with all that they missed;
    in the end they have computed no token twice. (The others hardly count, so that the lead is as
    sure of each token as it is alone: by a gate in the middle, of half of them.)
    """
    [alone] = answer(build_engine(folders), gated(PROMPT, gate=0.0, max_tokens=24))
    gate = median(math.exp(token.logprob or 0.0) for chunk in alone for token in chunk.tokens)
    wanted = replace(gated(PROMPT, gate=gate, max_tokens=24), weights=(1, 1e-6, 1e-6))
    engine = build_engine(folders)

    async def run() -> tuple[int, int]:
        async with running(engine):
            rows.clear()
            await read(engine, wanted)
            return engine.stats().gated_tokens_total, engine.stats().fused_tokens_total

    num_gated, num_fused = asyncio.run(run())
    others = [num_tokens for num_lanes, num_tokens in rows if num_lanes == 2]
    lead = [num_tokens for num_lanes, num_tokens in rows if num_lanes == 1]
    assert lead == [len(PROMPT), *[1] * 23]
    assert (len(others), num_fused, num_gated) == (12, 12, 24)
    assert max(others[1:]) > 1, "several at once"
    assert sum(others) <= len(PROMPT) + 23


def test_others_find_the_prefixes_that_they_have(folders: list[Path]) -> None:
    """A later turn starts from what lead and others computed, each as far as it came; and whoever
    asks one of the others beside a lead that runs alone does not wait for it.
    """
    later = [*PROMPT, *range(100, 120)]

    async def turns(engine: Engine) -> list[list[Chunk]]:
        wanted = [
            gated(PROMPT, gate=0.99, max_tokens=4),
            gated(later, gate=0.13, max_tokens=9),
            gated(later, gate=0.99, max_tokens=4),
        ]
        async with running(engine):
            answers = [await read(engine, one) for one in wanted]
            beside = gated([*later, 7, 8], gate=0.0, max_tokens=60)
            both = await asyncio.gather(
                read(engine, beside), read(engine, request([*later, 7, 8], ("m0",)))
            )
            return [*answers, *both]

    with_prefixes = asyncio.run(turns(build_engine(folders)))
    without = asyncio.run(turns(build_engine(folders, prefix_cache=False)))
    assert [token_ids(one) for one in with_prefixes] == [token_ids(one) for one in without]
    found = [chunks[-1].cached_tokens for chunks in with_prefixes]
    assert found[:3] == [0, len(PROMPT), len(later) - 1]
