"""Plans run as their combinators say, whatever fails, and every token is accounted for."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.engines.base import Chunk
from models.errors import EngineFailed, EngineOverloaded
from policies.cascade.base import Attempt
from policies.plan import from_json
from router.engines import merge
from router.executor.trace import Trace, tokens_of
from tests.router.executor.running import chunks_of, says, scripted, task_of

UNSURE = 0.2
SLOW = {"answers": ["slow"], "time_to_first_token_s": 200}
BROKEN = {"fail_after_tokens": 1}

Run = Callable[..., tuple[Chunk, Trace]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a plan on models with the given scripts; return the whole answer and the trace."""

    def run(data: Any, scripts: dict[str, Any], **options: Any) -> tuple[Chunk, Trace]:
        stream = options.pop("stream", False)
        trace = Trace()
        executor = scripted(tmp_path, scripts, **options)
        task = task_of(stream=stream, logprobs=False)  # as of a client who does not ask for them
        return merge(asyncio.run(chunks_of(executor, from_json(data), task, trace))), trace

    return run


def _outcomes(trace: Trace) -> dict[str, str]:
    return {path: run.outcome for path, run in trace.runs.items()}


CASCADE = {"cascade": {"stages": ["a", "b", "c"], "thresholds": [0.5, 0.5]}}


@pytest.mark.parametrize("stream", [False, True])
def test_cascade_stops_at_the_first_good_answer(run: Run, stream: bool) -> None:
    """An unsure stage is rejected, the next is accepted, the third never runs."""
    scripts = {"a": says("no", UNSURE), "b": says("yes"), "c": says("never")}
    answer, trace = run(CASCADE, scripts, stream=stream)
    assert answer.text == "yes"
    assert _outcomes(trace) == {"": "ok", "0": "rejected", "1": "ok"}
    assert trace.runs["0"].score == pytest.approx(0.2)
    assert trace.runs["1"].score == pytest.approx(0.9)
    accepted = trace.accepted()
    assert accepted is not None
    assert accepted.members == ("b",)
    assert tokens_of(trace.leaves())["a"].output_tokens == 3


def test_a_stage_has_its_own_time(run: Run) -> None:
    """A plan's timeout ends its stage, though the server would wait; None leaves it to the server.

    The first stage is given 50 ms, the second as long as the server gives.
    """
    stages = {"stages": ["slow", "slower", "c"], "thresholds": [0, 0], "timeouts_s": [0.05, None]}
    scripts = {
        "slow": SLOW,
        "slower": {"answers": ["in time"], "time_to_first_token_s": 0.2},
        "c": says("never"),
    }
    answer, trace = run({"cascade": stages}, scripts, stage_timeout_s=60)
    assert answer.text == "in time"
    assert _outcomes(trace) == {"": "ok", "0": "timeout", "1": "ok"}


def test_scorers_see_the_mean_entropy(tmp_path: Path) -> None:
    """What the engine says of its tokens' entropy reaches the scorer, and None where it is mute."""
    seen: list[Attempt] = []

    class Spy:
        def score(self, attempt: Attempt) -> float:
            seen.append(attempt)
            return 0.0

    scripts = {"a": says("one", entropy=0.7), "b": says("two"), "c": says("three")}
    executor = scripted(tmp_path, scripts, {"spy": Spy()})
    body = {"stages": ["a", "b", "c"], "thresholds": [0.5, 0.5], "scorer": "spy"}
    asyncio.run(chunks_of(executor, from_json({"cascade": body}), task_of(), Trace()))
    assert [attempt.entropy_mean for attempt in seen] == [pytest.approx(0.7), None]


def test_cascades_last_stage_streams(run: Run, tmp_path: Path) -> None:
    """The last stage is accepted unseen, so its tokens come one by one."""
    scripts = {"a": says("no", UNSURE), "b": says("no", UNSURE), "c": says("last", UNSURE)}
    executor = scripted(tmp_path, scripts)
    task = task_of(stream=True)
    chunks = asyncio.run(chunks_of(executor, from_json(CASCADE), task, Trace()))
    assert [chunk.text for chunk in chunks] == ["l", "a", "s", "t", ""]


def test_cascade_survives_failing_and_slow_stages(run: Run) -> None:
    """A stage that fails, and one that takes too long, move on to the next, and it is noted."""
    stages = {**CASCADE["cascade"], "timeouts_s": [60, None]}
    scripts = {"a": BROKEN, "b": SLOW, "c": says("saved")}
    answer, trace = run({"cascade": stages}, scripts, stage_timeout_s=0.05)
    assert answer.text == "saved"
    assert _outcomes(trace) == {"": "ok", "0": "failed", "1": "timeout", "2": "ok"}
    assert trace.runs["0"].error == "the script fails after 1 tokens"


@pytest.mark.parametrize("stream", [False, True])
def test_cascade_falls_back_on_the_best_rejected_answer(run: Run, stream: bool) -> None:
    """If the last stage fails, the likeliest of the rejected answers is better than none."""
    scripts = {"a": says("poor", UNSURE), "b": says("fair", 0.4), "c": {"refuse": True}}
    answer, trace = run(CASCADE, scripts, stream=stream)
    assert answer.text == "fair"
    assert _outcomes(trace) == {"": "ok", "0": "rejected", "1": "ok", "2": "failed"}


def test_cascade_fails_when_every_stage_does(run: Run) -> None:
    """With no answer at all, the last stage's error is raised."""
    with pytest.raises(EngineOverloaded):
        run(CASCADE, {"a": BROKEN, "b": BROKEN, "c": {"refuse": True}})


def test_majority_wins_and_stops_early(run: Run) -> None:
    """Answers that differ in case and closing marks are one vote; a decided vote ends at once."""
    best = {"best": {"candidates": ["a", "b", "c"]}}
    scripts = {"a": says("Yes."), "b": says("yes"), "c": SLOW}
    answer, trace = run(best, scripts)
    assert answer.text == "Yes."
    assert _outcomes(trace) == {"": "ok", "0": "ok", "1": "rejected", "2": "cancelled"}


def test_majority_ignores_failures_and_prefers_earlier_on_ties(run: Run) -> None:
    """A candidate that fails doesn't vote; on a tie the earlier one wins."""
    best = {"best": {"candidates": ["a", "b", "c"]}}
    answer, trace = run(best, {"a": BROKEN, "b": says("one"), "c": says("two")})
    assert answer.text == "one"
    assert _outcomes(trace) == {"": "ok", "0": "failed", "1": "ok", "2": "rejected"}
    with pytest.raises(EngineFailed):
        run(best, {"a": BROKEN, "b": BROKEN, "c": BROKEN})


def test_best_by_confidence(run: Run) -> None:
    """The candidate with the highest mean token probability is chosen."""
    best = {"best": {"candidates": ["a", "b"], "select": "confidence"}}
    answer, trace = run(best, {"a": says("low", UNSURE), "b": says("high")})
    assert answer.text == "high"
    assert trace.runs["0"].score == pytest.approx(0.2)


def test_any_nesting(run: Run) -> None:
    """A cascade of a vote of cascades and a fused answer runs, and each node has its path."""
    fused = {"answer": {"members": ["a", "b"], "weights": [1, 3]}}
    inner = {"cascade": {"stages": ["a", "c"], "thresholds": [0.5]}}
    vote = {"best": {"candidates": [inner, "a", "b"]}}
    plan = {"cascade": {"stages": [vote, fused], "thresholds": [0.95]}}
    scripts = {"a": says("x", UNSURE), "b": says("y", UNSURE), "c": says("y")}
    answer, trace = run(plan, scripts)
    assert answer.text == "x"  # the fused answer plays its first member's script
    assert _outcomes(trace) == {
        "": "ok",
        "0": "rejected",
        "0.0": "ok",
        "0.0.0": "rejected",
        "0.0.1": "ok",
        "0.1": "rejected",
        "0.2": "rejected",
        "1": "ok",
    }
    accepted = trace.accepted()
    assert accepted is not None
    assert accepted.members == ("a", "b")


@pytest.mark.parametrize("stream", [False, True])
async def test_closing_early_cancels_everything(tmp_path: Path, stream: bool) -> None:
    """Cancelling the reader of a nested plan leaves no lane, and the engine tells the tokens."""
    slow = {"answers": ["x" * 100], "token_latency_s": 0.01}

    executor = scripted(tmp_path, {"a": slow, "b": slow})
    worker, trace = executor.engines["e"], Trace()
    plan = {"best": {"candidates": ["a", {"cascade": {"stages": ["b"], "thresholds": []}}]}}
    reader = asyncio.create_task(
        chunks_of(executor, from_json(plan), task_of(stream=stream), trace)
    )
    while (await worker.stats()).generated_tokens_total < 10:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    stats = await worker.stats()
    assert stats.active_lanes == 0
    cut = list(trace.interrupted())
    assert [run.path for run in cut] == ["0", "1.0"]
    used = [(await worker.settle(run.request_id or "")).num_tokens for run in cut]
    assert sum(used) == stats.generated_tokens_total


def test_tokens_are_counted_for_everything_that_ran(run: Run) -> None:
    """Each member's tokens add up over stages and candidates; fused members count each."""
    plan = {"best": {"candidates": ["a", {"answer": {"members": ["a", "b"]}}]}}
    _, trace = run(plan, {"a": says("xyz"), "b": says("q")})
    tokens = tokens_of(trace.leaves())
    assert (tokens["a"].prompt_tokens, tokens["a"].output_tokens) == (2, 8)
    assert (tokens["b"].prompt_tokens, tokens["b"].output_tokens) == (1, 4)
