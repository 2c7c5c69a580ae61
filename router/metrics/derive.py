"""What one row of the ledger adds to the counters and histograms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from router.metrics import families as f
from router.metrics.family import SUM, Family, Series
from router.record import CLIENT_CLOSED_REQUEST, SHADOW

_ESCALATING = ("rejected", "hopeless", "failed", "timeout")


class Tally(defaultdict[Series, float]):
    """Sums per series."""

    def __init__(self) -> None:
        super().__init__(float)

    def observe(self, family: Family, label: str, value: float) -> None:
        """Put `value` into its bucket of a histogram with one label."""
        self[family.name, label, family.bucket(value)] += 1
        self[family.name, label, SUM] += value


def tally(rows: Iterable[Mapping[str, Any]]) -> Tally:
    """Return what `rows` of the table `requests` count for."""
    counts = Tally()
    for row in rows:
        _count(row, counts)
    return counts


def _count(row: Mapping[str, Any], counts: Tally) -> None:
    """Add one row; what a shadow answered costs like all else, but is no request of a client."""
    policy = row["policy"] or f.NONE
    if row["endpoint"] == SHADOW:
        _count_models(row, policy, f"{SHADOW}/{row['request_id'].partition('/')[0]}", counts)
        return
    arm = f"{row['experiment']}/{row['arm']}" if row["arm"] is not None else f.NONE
    _count_models(row, policy, arm, counts)
    status = row["status"]
    counts[f.REQUESTS.name, policy, arm, str(status)] += 1
    if status >= 400 or row["error"] is not None:
        counts[f.ERRORS.name, _error_type(row)] += 1
    if row["plan"] is not None:
        counts[f.PLANS.name, policy, _shape(row["plan"])] += 1
    if row["scores"]:
        counts.observe(f.CONFIDENCE, policy, max(row["scores"].values()))
    stages = list(_by_choice(row["stages"] or ()))
    for runs in stages:
        _count_cascades(runs, policy, counts)
    if status < 400:
        _count_times(row, policy, counts)
        for runs in stages:
            for num_members in _accepted_members(runs):
                counts.observe(f.MEMBERS, policy, num_members)


def _count_models(row: Mapping[str, Any], policy: str, arm: str, counts: Tally) -> None:
    costs = row["costs"] or {}
    for model, tokens in (row["members"] or {}).items():
        who = (model, policy, arm)
        read, written = tokens["prompt_tokens"], tokens["output_tokens"]
        if not read and not written:
            continue
        counts[f.MODEL_REQUESTS.name, *who] += 1
        counts[f.TOKENS.name, *who, "prompt"] += read
        counts[f.TOKENS.name, *who, "output"] += written
        cost = costs.get(model)
        if cost is not None:
            method = cost["method"] or f.NONE
            counts[f.COST_USD.name, *who] += cost["usd"]
            counts[f.ENERGY_WH.name, *who, method] += cost["wh"]
            counts[f.CARBON_GCO2E.name, *who, method] += cost["gco2e"]


def _count_times(row: Mapping[str, Any], policy: str, counts: Tally) -> None:
    counts.observe(f.DURATION_S, policy, row["latency_s"])
    ttft_s = row["ttft_s"]
    if not row["stream"] or ttft_s is None:
        return
    counts.observe(f.FIRST_TOKEN_S, policy, ttft_s)
    # Several answers come side by side.
    tokens_after_first = row["output_tokens"] / max(1, row["num_choices"]) - 1
    if tokens_after_first >= 1:
        per_token_s = max(0.0, row["latency_s"] - ttft_s) / tokens_after_first
        counts.observe(f.PER_TOKEN_S, policy, per_token_s)


def _count_cascades(runs: Mapping[str, Mapping[str, Any]], policy: str, counts: Tally) -> None:
    for path, run in runs.items():
        if run.get("combinator") != "cascade":
            continue
        prefix = f"{path}." if path else ""
        reached = 0
        while f"{prefix}{reached}" in runs:
            reached += 1
        if reached:
            counts[f.CASCADE_STAGES.name, policy, str(reached)] += 1
        for index in range(reached - 1):
            outcome = runs[f"{prefix}{index}"].get("outcome")
            reason = outcome if outcome in _ESCALATING else "rejected"
            counts[f.ESCALATIONS.name, policy, reason] += 1


def _accepted_members(runs: Mapping[str, Mapping[str, Any]]) -> Iterator[int]:
    """Yield the size of the accepted answer, if one was: it and all above it ended well."""
    accepted = {path for path, run in runs.items() if run.get("outcome") == "ok"}
    for path, run in runs.items():
        parts = path.split(".") if path else []
        above = {".".join(parts[:size]) for size in range(len(parts) + 1)}
        if "members" in run and above <= accepted:
            yield len(run["members"])
            return


def _by_choice(
    stages: Iterable[Mapping[str, Any]],
) -> Iterable[Mapping[str, Mapping[str, Any]]]:
    """Return what ran for each choice, by path."""
    choices: dict[int, dict[str, Mapping[str, Any]]] = {}
    for run in stages:
        choices.setdefault(run.get("choice", 0), {})[run["path"]] = run
    return choices.values()


def _shape(plan: Mapping[str, Any]) -> str:
    """Return a plan's outermost combinator; an answer of several members is "fused"."""
    [(shape, body)] = plan.items()
    return "fused" if shape == "answer" and len(body["members"]) > 1 else shape


def _error_type(row: Mapping[str, Any]) -> str:
    if row["error"] is not None:
        return str(row["error"])
    return "client_left" if row["status"] == CLIENT_CLOSED_REQUEST else f"http_{row['status']}"
