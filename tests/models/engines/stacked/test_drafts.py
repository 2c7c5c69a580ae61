"""Drafted answers: the tokens of answers without drafts, in fewer steps."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from models.engines.base import Chunk, Engine, GenerationRequest, Structure
from models.engines.stacked import drafts as drafts_module
from models.engines.stacked.drafts import StepCosts
from models.engines.stacked.runner import Runner
from models.errors import PoolError
from models.pool import DEFAULT_POOL, load_pool
from models.tokenizer import load_tokenizer
from policies.outcomes import read_outcomes
from tests.models.engines.stacked.tiny import (
    answer,
    build_engine,
    load_reference,
    read,
    request,
    running,
    save_checkpoint,
    text_of,
    token_ids,
)

DRAFTS: dict[str, Any] = {
    "ngram": "ngram",
    "heaviest": "heaviest",
    "member": {"member": "m1"},
    "another shape": {"member": "m3"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three random checkpoints of one shape, and one of another."""
    root = tmp_path_factory.mktemp("drafts")
    alike = [save_checkpoint(root / f"{s}", seed=s, initializer_range=0.08) for s in range(3)]
    return [*alike, save_checkpoint(root / "small", seed=0, num_hidden_layers=1)]


@pytest.fixture(name="always")
def drafts_that_always_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every step took as long and a guess nothing: drafts are made wherever they can be."""
    costs = StepCosts(one_s=1.0, all_s=1.0, num_members=1, factors={1: 1.0, 2: 1.0})
    monkeypatch.setattr(StepCosts, "measured", lambda *_: costs)
    monkeypatch.setattr(drafts_module.MemberDrafts, "cost_s", lambda _: 0.0)


def build(folders: list[Path], how: str | None, **options: Any) -> Engine:
    """An engine that drafts."""
    draft = DRAFTS[how] if how else None
    members = folders if how == "another shape" else folders[:3]
    return build_engine(members, draft=draft, **options)


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}

requests = st.builds(
    request,
    st.lists(st.integers(2, 9), min_size=4, max_size=50),  # few tokens, so that they come again
    st.lists(st.sampled_from(["m0", "m1", "m2"]), min_size=1, max_size=3, unique=True),
    rule=st.sampled_from(["mixture", "product"]),
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    top_p=st.sampled_from([1.0, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    min_tokens=st.sampled_from([0, 8]),
    structure=st.sampled_from([None, Structure(kind="json", text=json.dumps(SCHEMA))]),
    logit_bias=st.sampled_from([{}, {7: 5.0}]),
    seed=st.integers(0, 99),
    max_tokens=st.integers(1, 24),
    top_logprobs=st.just(2),
)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("how", DRAFTS)
# Shrinking would run into the test's time limit.
@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(wanted=st.lists(requests, min_size=1, max_size=5), rows=st.sampled_from([300, 4000]))
def test_no_draft_changes_a_token(
    folders: list[Path], how: str, wanted: list[GenerationRequest], rows: int
) -> None:
    """Greedy or drawn with a seed, fused or not, under penalties, biases and grammars, in one
    batch, with a small cache and a large one: the same tokens, and the same told of them.
    """
    memory = {"kv_memory_bytes": rows * 2 * 2 * 2 * 16 * 4}
    with_drafts = answer(build(folders, how, **memory), *wanted)
    without = answer(build(folders, None, **memory), *wanted)
    assert [token_ids(one) for one in with_drafts] == [token_ids(one) for one in without]
    assert [text_of(one) for one in with_drafts] == [text_of(one) for one in without]
    for one, other in zip(with_drafts, without, strict=True):
        assert told(one) == pytest.approx(told(other), abs=1e-4)


def told(chunks: Seq[Chunk]) -> list[float]:
    """Log-probabilities and entropies of an answer."""
    tokens = [token for chunk in chunks for token in chunk.tokens]
    return [value for token in tokens for value in (token.logprob or 0.0, token.entropy or 0.0)]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("how", ["ngram", "heaviest"])
def test_drawn_tokens_follow_the_exact_distribution(folders: list[Path], how: str) -> None:
    """2,000 answers of six tokens without a seed, over a vocabulary of two, are distributed as the
    fused distributions say, computed by transformers (chi-square).
    """
    allowed, temperature, number = (5, 6), 0.7, 2000
    prompt = [5, 5, 5, 6, 5, 6, 6, 6, 5, 5]  # every three of them are there
    wanted = request(
        prompt,
        ("m0", "m1"),
        max_tokens=6,
        temperature=temperature,
        logit_bias=dict.fromkeys(allowed, 100.0),
        ignore_eos=True,
    )
    references = [load_reference(folder) for folder in folders[:2]]
    expected = exact(references, prompt, allowed, temperature)

    async def run() -> tuple[Counter[tuple[int, ...]], int]:
        engine, counts = build(folders, how, max_queued_requests=number), Counter[tuple[int, ...]]()
        async with running(engine):
            answers = (read(engine, replace(wanted, request_id=str(i))) for i in range(number))
            for chunks in await asyncio.gather(*answers):
                counts[tuple(token_ids(chunks))] += 1
            return counts, engine.stats().accepted_tokens_total

    counts, num_accepted = asyncio.run(run())
    assert num_accepted > number, "drafts took part"
    # Rare answers are counted together.
    often = [answer for answer, share in expected.items() if number * share > 5]
    rest = number - sum(counts[answer] for answer in often)
    shares = [expected[answer] for answer in often]
    seen = [*(counts[answer] for answer in often), rest]
    due = [number * share for share in (*shares, max(1 - sum(shares), 1e-9))]
    assert chisquare(seen, due).pvalue > 1e-4


def exact(
    references: list[Any], prompt: list[int], allowed: Seq[int], temperature: float
) -> dict[tuple[int, ...], float]:
    """The probability of every answer of six of the `allowed` tokens."""

    def after(tokens: list[int]) -> list[float]:
        with torch.inference_mode():
            logits = [reference(torch.tensor([tokens])).logits[0, -1] for reference in references]
        fused = torch.stack(logits).double().softmax(-1).mean(0)[list(allowed)]
        return [float(p) for p in (fused.log() / temperature).softmax(-1)]

    found: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(6):
        found = {
            (*answer, token): share * p
            for answer, share in found.items()
            for token, p in zip(allowed, after([*prompt, *answer]), strict=True)
        }
    return found


@pytest.mark.usefixtures("always")
def test_right_guesses_save_steps(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A member that drafts for itself is always right: an answer takes a third of the steps that
    check, and the rest of what the cache held is free again.
    """
    checks: list[tuple[int, ...]] = []
    step = Runner.step

    def counting(self: Runner, parts: Any) -> Any:
        checks.extend(part.draft for part in parts if part.draft)
        return step(self, parts)

    monkeypatch.setattr(Runner, "step", counting)
    engine = build(folders, "heaviest")

    async def run() -> Any:
        async with running(engine):
            wanted = request(range(9, 30), ("m0",), max_tokens=40, ignore_eos=True)
            chunks = await read(engine, wanted)
            stats = engine.stats()
            assert stats.kv_bytes_used == 0
            return token_ids(chunks), stats

    tokens, stats = asyncio.run(run())
    assert len(tokens) == 40
    assert stats.accepted_tokens_total == stats.drafted_tokens_total > 30
    assert len(checks) < 20


@pytest.mark.usefixtures("always")
def test_guesses_follow_the_text(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever became of its earlier guesses, a member guesses what it says of the text so far."""
    drafts: list[tuple[list[int], tuple[int, ...]]] = []
    step = Runner.step

    def noting(self: Runner, parts: Any) -> Any:
        drafts.extend((list(part.sequence.tokens), part.draft) for part in parts if part.draft)
        return step(self, parts)

    monkeypatch.setattr(Runner, "step", noting)
    answer(
        build(folders, "another shape"),
        request(range(9, 30), ("m0",), max_tokens=60, ignore_eos=True),
    )
    reference, num_checked = load_reference(folders[3]), 0
    for tokens, draft in drafts:
        if tokens[0]:  # the engine's own first steps are of zeros
            with torch.inference_mode():
                said = reference(torch.tensor([[*tokens, *draft]])).logits[0].argmax(-1)
            assert draft == tuple(said[len(tokens) - 1 : -1].tolist())
            num_checked += 1
    assert num_checked > 5


def test_drafts_that_do_not_pay_are_not_made(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a guess costs as much as a token, or is mostly wrong, hardly any is made."""

    def drafted(costs: StepCosts, guess_s: float, how: str, seed: int) -> int:
        monkeypatch.setattr(StepCosts, "measured", lambda *_: costs)
        monkeypatch.setattr(drafts_module.MemberDrafts, "cost_s", lambda _: guess_s)
        engine = build(folders, how)

        async def run() -> int:
            async with running(engine):
                wanted = request(range(9, 30), ("m0",), max_tokens=100, ignore_eos=True)
                await read(engine, replace(wanted, sampling=replace(wanted.sampling, seed=seed)))
                return engine.stats().drafted_tokens_total

        return asyncio.run(run())

    same = StepCosts(one_s=1.0, all_s=1.0, num_members=1, factors={1: 1.0, 2: 1.0})
    assert drafted(same, 1.0, "heaviest", 0) == 0
    more = StepCosts(one_s=1.0, all_s=1.0, num_members=1, factors={1: 1.0, 2: 2.0})
    assert drafted(more, 0.0, "heaviest", 0) == 0, "rows cost as much as steps"
    assert drafted(same, 0.2, "another shape", 0) < 50, "random members do not agree"


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ({"member": "m7"}, "'m7' is not one of several models"),
        ({"member": "m0", "length": 3}, "length"),
        ("bigram", "ngram"),
    ],
)
def test_senseless_drafts_are_refused(folders: list[Path], draft: Any, message: str) -> None:
    """The error names the key and what is allowed."""
    with pytest.raises(PoolError, match=message):
        build_engine(folders[:3], draft=draft)


def test_who_only_drafts_answers_nothing(folders: list[Path]) -> None:
    """A drafting member of another shape is none that a request may name."""
    assert build(folders, "another shape").members == ("m0", "m1", "m2")


def test_two_hundred_greedy_answers_stay_what_they_are() -> None:
    """The shipped base, with kept prefixes and its chunk's drafts, by n-grams, and plainly: the
    same 100 questions, each asked twice, token for token.
    """
    told = read_outcomes(DEFAULT_POOL / "outcomes.jsonl")
    texts = [row.query for row in told if row.split == "test"][::32]
    tokenizer = load_tokenizer(load_pool(DEFAULT_POOL).model("base"))
    folders = [DEFAULT_POOL / "base", DEFAULT_POOL / "text"]

    def tokens(**options: Any) -> list[list[int]]:
        engine = build_engine(folders, leads=("m1",), kv_memory_bytes=2**26, **options)

        async def run() -> list[list[int]]:
            async with running(engine):
                answers = []
                for text in texts * 2:
                    prompt = tokenizer.encode_chat([{"role": "user", "content": text}])
                    answers.append(token_ids(await read(engine, request(prompt, max_tokens=24))))
                return answers

        return asyncio.run(run())

    plain = tokens(prefix_cache=False)
    assert len(plain) == 200
    assert tokens(draft={"member": "m1"}) == plain
    assert tokens(draft="ngram") == plain
