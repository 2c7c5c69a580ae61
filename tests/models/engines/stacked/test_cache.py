"""Prompts that begin like earlier ones: the same tokens for less work."""

import asyncio
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from models.engines.base import Chunk, Engine, Evidence, GenerationRequest
from models.engines.stacked.cache import BLOCK_TOKENS, Arena, PrefixCache
from models.engines.stacked.runner import Runner
from models.errors import EngineFailed
from tests.models.engines.stacked.tiny import (
    VOCAB_SIZE,
    build_engine,
    make_sequence,
    read,
    request,
    running,
    save_checkpoint,
    token_ids,
)

START = list(range(10, 10 + 3 * BLOCK_TOKENS))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three random checkpoints."""
    root = tmp_path_factory.mktemp("cache")
    return [save_checkpoint(root / f"{s}", seed=s, initializer_range=0.08) for s in range(3)]


def reused(chunks: Seq[Chunk]) -> int:
    """How many of the prompt's tokens an answer found."""
    told = [chunk.cached_tokens for chunk in chunks if chunk.cached_tokens is not None]
    assert len(told) == 1, "an answer says so once"
    return told[0]


def in_turn(engine: Engine, *wanted: GenerationRequest) -> list[list[Chunk]]:
    """Start the engine, answer one request after the other, stop it."""

    async def run() -> list[list[Chunk]]:
        async with running(engine):
            return [await read(engine, one) for one in wanted]

    return asyncio.run(run())


members = st.lists(st.sampled_from(["m0", "m1", "m2"]), min_size=1, max_size=3, unique=True)
turns = st.lists(
    st.tuples(st.integers(1, 40), members, st.integers(1, 12), st.integers(0, 9)),
    min_size=2,
    max_size=5,
)


# Shrinking would run into the test's time limit.
@settings(max_examples=12, phases=[Phase.explicit, Phase.generate])
@given(conversations=st.lists(turns, min_size=1, max_size=3), rows=st.sampled_from([500, 4000]))
def test_tokens_never_change(
    folders: list[Path],
    conversations: list[list[tuple[int, list[str], int, int]]],
    rows: int,
) -> None:
    """Conversations side by side that begin alike, on whatever members, in a small and a large
    cache: every turn's tokens are those of an engine that keeps nothing.
    """
    row_bytes = 2 * 2 * 2 * 16 * 4

    async def talk(engine: Engine, turns: list[tuple[int, list[str], int, int]]) -> list[list[int]]:
        said, answers = list(START), list[list[int]]()
        for number, (num_new, names, max_tokens, seed) in enumerate(turns):
            said += [2 + (7 * seed + 3 * i + number) % (VOCAB_SIZE - 2) for i in range(num_new)]
            wanted = request(said[-150:], names, max_tokens=max_tokens, seed=seed, temperature=1.0)
            answers.append(token_ids(await read(engine, wanted)))
            said += answers[-1]
        return answers

    async def all_of(**options: Any) -> list[list[list[int]]]:
        engine = build_engine(folders, kv_memory_bytes=rows * row_bytes, **options)
        async with running(engine):
            return await asyncio.gather(*(talk(engine, turns) for turns in conversations))

    assert asyncio.run(all_of()) == asyncio.run(all_of(prefix_cache=False))


def test_a_later_turn_finds_the_earlier_ones(folders: list[Path]) -> None:
    """All but the last token of what was said and answered before, and the message's own."""
    engine = build_engine(folders)
    first, second = START, [*START, *range(100, 120)]
    (one, two, three) = in_turn(
        engine,
        request(first, max_tokens=6),
        request(second, max_tokens=6),
        request(second, max_tokens=6),
    )
    assert reused(one) == 0
    assert reused(two) >= len(first) - 1
    assert reused(three) == len(second) - 1, "the last token is computed"
    assert token_ids(two) == token_ids(three)


def test_a_fused_answer_finds_what_every_member_has(folders: list[Path]) -> None:
    """Rows belong to a member: as many are reused as the lane with the fewest has."""
    engine = build_engine(folders)
    longer = [*START, *range(100, 140)]
    apart, more, both, none = in_turn(
        engine,
        request(START, ["m0"], max_tokens=1),
        request(longer, ["m1"], max_tokens=1),
        request(longer, ["m0", "m1"], max_tokens=1),
        request(longer, ["m0", "m2"], max_tokens=1),
    )
    assert reused(apart) == reused(more) == reused(none) == 0
    assert reused(both) == len(START)


def test_choices_share_a_prompt_that_one_of_them_computes(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight that arrive at once: the prompt's rows go through the model once."""
    rows = []
    step = Runner.step
    monkeypatch.setattr(
        Runner,
        "step",
        lambda self, parts: rows.extend(p.num_rows for p in parts) or step(self, parts),
    )
    engine = build_engine(folders)

    async def run() -> list[list[Chunk]]:
        async with running(engine):
            wanted = [request(START, max_tokens=1, seed=i, temperature=1.0) for i in range(8)]
            return await asyncio.gather(*(read(engine, one) for one in wanted))

    found = sorted(reused(chunks) for chunks in asyncio.run(run()))
    assert found == [0, *[len(START) - 1] * 7]
    assert sum(rows[2:]) == len(START) + 7, "after the two steps of the start"


def test_who_reads_the_prompt_computes_it(folders: list[Path]) -> None:
    """Log-probabilities of a prompt and evidence from it are the same after an earlier request."""
    engine = build_engine(folders)
    scored = request(START, max_tokens=1, prompt_logprobs=0)
    weighed = replace(request(START, ["m0", "m1"], max_tokens=1), evidence=Evidence())
    _, again, weights = in_turn(engine, scored, scored, weighed)
    assert reused(again) == reused(weights) == 0
    assert len([token for chunk in again for token in chunk.prompt]) == len(START)


def test_after_a_failure_nothing_is_reused(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a failed request touched lends nothing to the next."""
    engine = build_engine(folders)
    step, broken = Runner.step, list[bool]()

    def fail(self: Runner, parts: Any) -> Any:
        if broken:
            raise RuntimeError("broken")
        return step(self, parts)

    monkeypatch.setattr(Runner, "step", fail)

    async def run() -> tuple[int, int]:
        async with running(engine):
            await read(engine, request(START, max_tokens=2))
            found = await read(engine, request(START, max_tokens=2))
            broken.append(True)
            with pytest.raises(EngineFailed):
                await read(engine, request(START, max_tokens=2))
            broken.clear()
            return reused(found), reused(await read(engine, request(START, max_tokens=2)))

    assert asyncio.run(run()) == (len(START) - 1, 0)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 60), st.booleans()), max_size=40))
def test_no_row_is_lost_or_lent_twice(steps: list[tuple[int, int, bool]]) -> None:
    """Requests come, compute and end in any order: the regions of those that run never overlap,
    and when all have ended every row can be had again.
    """
    shape: Any = SimpleNamespace(num_layers=1, num_kv_heads=1, head_dim=1)
    arena = Arena(shape, 256 * 8, torch.device("cpu"), torch.float32)
    cache, here = PrefixCache(arena), list[Any]()
    for kind, num_tokens, fused in steps:
        if kind < 4:
            sequence = make_sequence(range(num_tokens), (0, 1) if fused else (0,))
            if cache.admit(sequence):
                here.append(sequence)
                if cache.begin(sequence):
                    sequence.num_cached = max(sequence.num_cached, num_tokens - kind)
        elif here:
            cache.end(here.pop(num_tokens % len(here)))
        taken = [row for s in here for row in range(s.region_start, s.region_start + s.num_rows)]
        assert len(taken) == len({*taken}) == cache.num_rows_held
    for sequence in here:
        cache.end(sequence)
    whole = make_sequence(range(256 - 7), (0,))
    assert cache.admit(whole), "what is only kept makes room"
    assert whole.num_rows == 256
