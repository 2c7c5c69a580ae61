"""A cascade whose scorer judges by what a model makes of the prompt, before its answer begins."""

import asyncio
from pathlib import Path

import pytest

from models.engines.base import Chunk
from models.pool import load_pool
from policies.cascade.base import Attempt, Reading
from policies.encoders.ngrams import NGrams
from policies.errors import PolicyError
from policies.plan import Plan, from_json
from policies.routing.fit import fit_router
from policies.routing.router import save_router
from router.catalog.catalog import load_catalog
from router.engines import merge
from router.executor.executor import Executor
from router.executor.trace import Trace
from tests.policies.routing.test_probing import READINGS, ROWS
from tests.router.conftest import write_pool
from tests.router.executor.running import chunks_of, says, scripted, task_of

PLAN = from_json({"cascade": {"stages": ["a", "b"], "thresholds": [0.5], "scorer": "seer"}})


class Seer:
    """Expects what it is told to, and remembers what it was shown."""

    def __init__(self, expected: float) -> None:
        self.expected = expected
        self.seen: list[Reading | None] = []

    def foresee(self, query: str, stage: Plan, reading: Reading | None) -> float:
        """Return what it was told to."""
        assert (query, stage) == ("the question", PLAN.stages[0])  # type: ignore[union-attr]
        self.seen.append(reading)
        return self.expected

    def score(self, attempt: Attempt) -> float:
        """Nobody asks."""
        raise AssertionError(attempt)


async def ask(executor: Executor, trace: Trace, **sampling: int) -> list[Chunk]:
    """Run the plan on a question of 12 bytes."""
    task = task_of("the question", max_tokens=20, stream=True, **sampling)
    return await chunks_of(executor, PLAN, task, trace)


def test_who_is_expected_to_do_well_streams(tmp_path: Path) -> None:
    """Its first chunk comes before its last is written, and shows nothing of the reading."""
    seer, trace = Seer(0.6), Trace()
    scripts = {"a": says("yes it is", 0.5, entropy=0.25), "b": says("no", 0.9)}
    chunks = asyncio.run(ask(scripted(tmp_path, scripts, {"seer": seer}), trace))
    assert len(chunks) > 1 and merge(chunks).text == "yes it is"
    assert all(not chunk.prompt and chunk.rows is None for chunk in chunks)
    assert list(trace.runs) == ["", "0"]
    assert (trace.runs["0"].outcome, trace.runs["0"].score) == ("ok", 0.6)
    [reading] = seer.seen
    assert reading is not None
    assert reading.entropy == 0.25
    assert reading.logprob_mean == pytest.approx(reading.logprob_min) == pytest.approx(-0.693147)


def test_who_is_not_only_reads(tmp_path: Path) -> None:
    """It is cancelled before it writes; what it used is settled, and the next stage answers."""

    async def run() -> None:
        trace = Trace()
        scripts = {"a": says("x" * 19, 0.5, token_latency_s=0.02), "b": says("no", 0.9)}
        executor = scripted(tmp_path, scripts, {"seer": Seer(0.4)})
        assert merge(await ask(executor, trace)).text == "no"
        read = trace.runs["0"]
        assert (read.outcome, read.output_tokens) == ("hopeless", 1)
        assert list(trace.interrupted()) == [read]
        assert trace.accepted_run() is trace.runs["1"]
        assert (await executor.engines["e"].settle(read.request_id or "")).num_tokens < 3
        assert (await executor.engines["e"].stats()).active_lanes == 0

    asyncio.run(run())


def test_whoever_fails_or_dawdles_before_it_has_read_is_passed_over(tmp_path: Path) -> None:
    """As any stage is."""
    for script in ({"refuse": True}, {"time_to_first_token_s": 5.0}):
        plan = from_json(
            {"cascade": {"stages": ["a", "b"], "thresholds": [0.5], "scorer": "seer",
                         "timeouts_s": [0.2]}}
        )  # fmt: skip
        seer, trace = Seer(1.0), Trace()
        executor = scripted(tmp_path, {"a": script, "b": says("no", 0.9)}, {"seer": seer})

        task = task_of("the question", max_tokens=20)
        assert asyncio.run(executor.whole(plan, task, trace)).text == "no"
        assert trace.runs["0"].outcome in ("failed", "timeout") and not seer.seen


def test_a_client_that_wants_its_prompt_back_gets_it(tmp_path: Path) -> None:
    """What the look asked for is not taken from who asked for it, too."""
    executor = scripted(tmp_path, {"a": says("yes", 0.5), "b": {}}, {"seer": Seer(1.0)})
    chunks = asyncio.run(ask(executor, Trace(), prompt_logprobs=0))
    assert len(merge(chunks).prompt) == 12


def test_a_model_that_tells_nothing_of_prompts_cannot_read(tmp_path: Path) -> None:
    """Refused when the pool loads, by name: a remote server shows no prompt's log-probabilities."""
    router = fit_router(ROWS, encoder=NGrams(bits=10), readings=READINGS)
    save_router(router, tmp_path / "router.npz")
    far = {"base_url": "http://127.0.0.1:1/v1"}
    engines = [
        {"name": "near", "kind": "fake"},
        {"name": "far", "kind": "remote", "options": far},
    ]
    policies = {"auto": {"kind": "probing", "path": "router.npz"}}
    others = [
        {"name": "dear", "engine": "near"},
        {"name": "distant", "engine": "far", "remote": {}},
    ]
    for cheap, refused in (({"engine": "near"}, False), ({"engine": "far", "remote": {}}, True)):
        models = [{"name": "cheap", **cheap}, *others]
        pool = write_pool(tmp_path, engines=engines, models=models, policies=policies)
        if refused:
            with pytest.raises(PolicyError, match="'cheap' read prompts, whose engine 'far'"):
                load_catalog(load_pool(pool))
        else:
            load_catalog(load_pool(pool))
