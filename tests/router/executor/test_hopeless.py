"""A cascade stops a stage as soon as its answer cannot be accepted any more."""

import asyncio
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from models.engines.base import Chunk
from models.errors import EngineOverloaded
from models.pool import load_pool
from policies.cascade.base import Attempt
from policies.errors import PolicyError
from policies.plan import from_json
from router.catalog.catalog import load_catalog
from router.catalog.policies import Policies
from router.engines import merge
from router.executor.executor import Executor
from router.executor.trace import Trace
from tests.router.executor.running import chunks_of, says, scripted, task_of

CASCADE = {"cascade": {"stages": ["a", "b"], "thresholds": [0.5]}}


async def answer_of(executor: Executor, data: Any, trace: Trace, *, stream: bool = False) -> Chunk:
    """Run the plan `data`, of at most 20 tokens, and return its whole answer."""
    task = task_of(stream=stream, max_tokens=20)
    return merge(await chunks_of(executor, from_json(data), task, trace))


@pytest.mark.parametrize("stream", [False, True])
def test_a_hopeless_stage_is_cancelled(tmp_path: Path, stream: bool) -> None:
    """Its lanes end early, what it used is settled, and the next stage answers.

    With at most 20 tokens of which each so far had P = 0.01, the bound falls below 0.5 at the
    fourth token: 4 ln 0.01 / 20 < ln 0.5.
    """

    async def run() -> None:
        scripts = {"a": says("x" * 19, 0.01, token_latency_s=0.02), "b": says("yes", 0.9)}
        executor, trace = scripted(tmp_path, scripts), Trace()
        answer = await answer_of(executor, CASCADE, trace, stream=stream)
        assert answer.text == "yes"
        stopped = trace.runs["0"]
        assert (stopped.outcome, trace.runs["1"].outcome) == ("hopeless", "ok")
        assert stopped.ended_s is not None
        assert stopped.ended_s <= trace.runs["1"].started_s
        assert stopped.output_tokens == 4
        assert trace.accepted_run() is trace.runs["1"]
        worker = executor.engines["e"]
        stats = await worker.stats()
        assert stats.active_lanes == 0
        assert list(trace.interrupted()) == [stopped]
        used = (await worker.settle(stopped.request_id or "")).num_tokens
        assert 4 <= used < 8
        assert used + trace.runs["1"].output_tokens == stats.generated_tokens_total

    asyncio.run(run())


def test_a_stage_that_can_still_pass_is_never_stopped(tmp_path: Path) -> None:
    """Watched or not, a cascade accepts the same answers (100 random answers, seed 0)."""

    class Unwatched:
        """Confidence without its bound."""

        def score(self, attempt: Attempt) -> float:
            return math.exp(attempt.logprob_mean)

    rng = random.Random(0)
    stopped = 0

    async def run() -> None:
        nonlocal stopped
        for _ in range(100):
            size, threshold = rng.randrange(18), rng.random()
            # Half of them lie within a rounding error of their threshold.
            sure = rng.choice([threshold, rng.uniform(0.01, 1)])
            scripts = {"a": says("x" * size, sure), "b": says("b", 0.9)}
            executor = scripted(tmp_path, scripts, {"unwatched": Unwatched()})
            texts = []
            for scorer in ("confidence", "unwatched"):
                body = {"stages": ["a", "b"], "thresholds": [threshold], "scorer": scorer}
                trace = Trace()
                texts.append((await answer_of(executor, {"cascade": body}, trace)).text)
                stopped += trace.runs["0"].outcome == "hopeless"
            assert texts[0] == texts[1]

    asyncio.run(run())
    assert stopped > 5


def test_a_stopped_stage_leaves_nothing_to_fall_back_on(tmp_path: Path) -> None:
    """Half an answer is none: if the last stage fails, its error is raised."""
    executor = scripted(tmp_path, {"a": says("x" * 19, 0.01), "b": {"refuse": True}})
    with pytest.raises(EngineOverloaded):
        asyncio.run(answer_of(executor, CASCADE, Trace()))


def test_a_slow_scorer_leaves_the_event_loop_free(tmp_path: Path) -> None:
    """While it scores a stage or candidates, other tasks run; candidates come in one batch."""
    loop: asyncio.AbstractEventLoop | None = None
    batches: list[int] = []

    class Slow:
        """Waits, while it scores, for something that only the event loop can do."""

        def score(self, attempt: Attempt) -> float:
            return self.score_batch([attempt])[0]

        def score_batch(self, attempts: Sequence[Attempt]) -> list[float]:
            assert loop is not None
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result(60)
            batches.append(len(attempts))
            return [float(attempt.answer == "yes") for attempt in attempts]

    async def run(data: Any) -> str:
        nonlocal loop
        loop = asyncio.get_running_loop()
        scripts = {"a": says("no", 0.9), "b": says("yes", 0.1), "c": says("never", 0.9)}
        executor = scripted(tmp_path, scripts, {"slow": Slow()})
        return (await answer_of(executor, data, Trace())).text

    body = {"stages": ["a", "b", "c"], "thresholds": [0.5, 0.5], "scorer": "slow"}
    assert asyncio.run(run({"cascade": body})) == "yes"
    best = {"candidates": ["a", "b", "c"], "select": "scorer", "scorer": "slow"}
    assert asyncio.run(run({"best": best})) == "yes"
    assert batches == [1, 1, 3]


def test_a_pool_file_names_scorers(tmp_path: Path) -> None:
    """A pool's scorer is known to plans by its name; mistakes name the scorer and the key."""
    scripted(tmp_path, {"a": {}})
    content = yaml.safe_load((tmp_path / "pool.yaml").read_text())
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text(
        '{"architectures": ["XForSequenceClassification"]}'
    )
    (tmp_path / "judge" / "model.safetensors").touch()

    def policies(scorers: dict[str, Any]) -> Policies:
        (tmp_path / "pool.yaml").write_text(yaml.safe_dump({**content, "scorers": scorers}))
        return load_catalog(load_pool(tmp_path)).policies

    plan = from_json({"cascade": {"stages": ["a", "a"], "thresholds": [0.5], "scorer": "judge"}})
    judge = {"kind": "transformer", "path": "judge"}
    policies({"judge": judge}).check(plan)
    with pytest.raises(PolicyError, match=r"cascade\.scorer: 'judge' is unknown"):
        policies({}).check(plan)
    with pytest.raises(PolicyError, match=r"scorers\.judge: transformer\.path: .* is not"):
        policies({"judge": {**judge, "path": "nowhere"}})
    with pytest.raises(PolicyError, match="scorers: the name 'confidence' is reserved"):
        policies({"confidence": judge})
