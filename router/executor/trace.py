"""What ran for one choice: one `Run` per node of the plan that was started.

A node's `path` is its position in the plan: "" is the root, "1.0" the first child of the root's
second child. Plans that took over from the one that failed are not below it: "+1", "+1.0".
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from policies.footprint import Footprint, Rates
from policies.plan import Answer, Cascade, Plan
from router.energy import EnergyUse
from router.record import MemberTokens

Outcome: TypeAlias = Literal[
    "running",  # not over yet, or cut off by the end of the whole request
    "ok",
    "rejected",  # a cascade went on, or a vote chose another
    "hopeless",  # a cascade stopped it, as it could not be accepted any more
    "failed",
    "timeout",
    "cancelled",  # no longer needed
]


@dataclass(kw_only=True)
class Run:
    """One node of the plan; mutable while it runs.

    `request_id` and `engine` are set for an `Answer` that reached its engine. `score` is what the
    parent's scorer or vote gave it. `settled` says that a cut-off run's tokens were asked for.
    `weights` are those with which several members were fused in the end; `energy` what the answer
    used, where it was measured. Where the first member wrote alone until it was unsure, `followed`
    is how many tokens each of the others read and wrote.
    """

    path: str
    plan: Plan
    started_s: float
    ended_s: float | None = None
    outcome: Outcome = "running"
    score: float | None = None
    error: str | None = None
    engine: str | None = None
    request_id: str | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    settled: bool = False
    weights: tuple[float, ...] | None = None
    energy: EnergyUse | None = None
    followed: tuple[int, int] | None = None

    def member_tokens(self) -> dict[str, MemberTokens]:
        """Return what each member of an `Answer` read and wrote: all alike, but for followers."""
        assert isinstance(self.plan, Answer)
        read, written = self.prompt_tokens, self.output_tokens
        first, *others = self.plan.members
        whole = MemberTokens(prompt_tokens=read, output_tokens=written)
        if self.followed is not None:
            read, written = self.followed
        other = MemberTokens(prompt_tokens=read, output_tokens=written)
        return {first: whole, **dict.fromkeys(others, other)}

    def to_json(self) -> dict[str, Any]:
        """Return what a client or the ledger may see; no text."""
        data: dict[str, Any] = {"path": self.path, "outcome": self.outcome}
        if isinstance(self.plan, Answer):
            data["members"] = list(self.plan.members)
            data["prompt_tokens"] = self.prompt_tokens
            data["output_tokens"] = self.output_tokens
            if self.engine is not None:
                data["engine"] = self.engine
            if self.followed is not None:
                data["followed_tokens"] = dict(zip(("read", "written"), self.followed, strict=True))
            if self.weights is not None:
                data["weights"] = [round(weight, 6) for weight in self.weights]
        else:
            data["combinator"] = "cascade" if isinstance(self.plan, Cascade) else "best"
        if self.score is not None:
            data["score"] = round(self.score, 6)
        if self.ended_s is not None:
            data["seconds"] = round(self.ended_s - self.started_s, 6)
        if self.error is not None:
            data["error"] = self.error
        return data


@dataclass(kw_only=True)
class Trace:
    """All runs of one choice, in the order in which they started. `clock` counts seconds."""

    clock: Callable[[], float] = time.perf_counter
    runs: dict[str, Run] = field(default_factory=dict)

    def begin(self, path: str, plan: Plan) -> Run:
        """Note that the node at `path` starts."""
        run = Run(path=path, plan=plan, started_s=self.clock())
        self.runs[path] = run
        return run

    def end(self, run: Run, outcome: Outcome, error: str | None = None) -> None:
        """Note how a run ended."""
        run.ended_s = self.clock()
        run.outcome = outcome
        run.error = error

    def end_below(self, path: str, outcome: Outcome, error: str | None = None) -> None:
        """Note how everything ended that still runs at `path` or below it."""
        for run in self.runs.values():
            below = run.path == path or not path or run.path.startswith(f"{path}.")
            if below and run.outcome == "running":
                self.end(run, outcome, error)

    def leaves(self) -> Iterator[Run]:
        """Yield the runs that generate."""
        return (run for run in self.runs.values() if isinstance(run.plan, Answer))

    def interrupted(self) -> Iterator[Run]:
        """Yield the runs whose engine may have written tokens that did not reach us."""
        return (
            run
            for run in self.leaves()
            if run.request_id is not None
            and not run.settled
            and run.outcome in ("running", "hopeless", "timeout", "cancelled")
        )

    def accepted(self) -> Answer | None:
        """Return the `Answer` whose text the client got, if any did."""
        run = self.accepted_run()
        return run.plan if run is not None and isinstance(run.plan, Answer) else None

    def accepted_run(self) -> Run | None:
        """Return the run of the `Answer` whose text the client got, if any did."""
        for run in self.leaves():
            if run.outcome in ("ok", "running") and not self._refused(run.path):
                return run
        return None

    def member_footprints(self, rates: Mapping[str, Rates]) -> Iterator[tuple[str, Footprint]]:
        """Yield what each member of each run cost: measured where a meter was, else by its rates.

        Members fused together share an answer's energy as they share its work: equally, but where
        some only follow a lead. Latencies are estimates; the request knows its own.
        """
        for run in self.leaves():
            tokens = run.member_tokens()
            for name, share in _shares(tokens, rates).items():
                yield name, _member_cost(run, tokens[name], rates[name], share)

    def _refused(self, path: str) -> bool:
        return any(self.runs[node].outcome not in ("ok", "running") for node in way_to(path))


def tokens_of(runs: Iterable[Run]) -> dict[str, MemberTokens]:
    """Return what each member read and wrote; members fused together each count whole."""
    read, written = Counter[str](), Counter[str]()
    for run in runs:
        for name, tokens in run.member_tokens().items():
            read[name] += tokens.prompt_tokens
            written[name] += tokens.output_tokens
    return {
        name: MemberTokens(prompt_tokens=read[name], output_tokens=written[name]) for name in read
    }


def _shares(tokens: Mapping[str, MemberTokens], rates: Mapping[str, Rates]) -> dict[str, float]:
    """Return each member's share of the work: its tokens, by what one takes where that is known."""
    if len(tokens) == 1:
        return dict.fromkeys(tokens, 1.0)
    flops = [rates[name].flops_per_token for name in tokens]
    per_token = flops if all(flops) else [1.0] * len(flops)
    work = [
        (one.prompt_tokens + one.output_tokens) * each
        for one, each in zip(tokens.values(), per_token, strict=True)
    ]
    total = sum(work)
    return {
        name: part / total if total else 1 / len(work)
        for name, part in zip(tokens, work, strict=True)
    }


def _member_cost(run: Run, tokens: MemberTokens, rates: Rates, share: float) -> Footprint:
    if run.energy is None:
        return rates.footprint(tokens.prompt_tokens, tokens.output_tokens)
    return rates.measured(
        tokens.prompt_tokens,
        tokens.output_tokens,
        wh=run.energy.wh * share,
        busy_s=run.energy.busy_s * share,
        idle_wh=run.energy.idle_wh * share,
        latency_s=0.0,
        method=run.energy.method,
    )


def child_path(path: str, index: int) -> str:
    """Return the path of child number `index` of the node at `path`."""
    return f"{path}.{index}" if path else str(index)


def way_to(path: str) -> list[str]:
    """Return the paths from the root down to the node at `path`."""
    parts = path.split(".") if path else []
    # What took over is not below the root that failed.
    return [".".join(parts[:size]) for size in range(path.startswith("+"), len(parts) + 1)]


def fallback_path(index: int) -> str:
    """Return the path of the root of plan number `index` of those that are tried in turn."""
    return f"+{index}" if index else ""
