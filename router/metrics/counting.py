"""What rows of the ledger add to counters and histograms, and where replicas keep the sums.

Counters are sums per series; a replica adds to them in the transaction that writes the rows they
come from, so that a row is counted exactly if it is kept. Nothing ever takes away from them, the
pruning of old rows included. Snapshots are gauges under the name of who published them.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import sqlalchemy as sa

from router.executor.trace import way_to
from router.ledger.database import Database, writing
from router.metrics import families as f
from router.metrics.families import SUM, Family, Series, Values
from router.record import CLIENT_CLOSED_REQUEST, SHADOW

logger = logging.getLogger(__name__)

_ESCALATING = ("rejected", "hopeless", "failed", "timeout")

# Both SQLite and PostgreSQL understand these.
_ADD = sa.text(
    "INSERT INTO metric_counters (series, value) VALUES (:series, :value) ON CONFLICT (series) "
    "DO UPDATE SET value = metric_counters.value + excluded.value"
)
_COUNTERS = sa.text("SELECT series, value FROM metric_counters")
_PUBLISH = sa.text(
    "INSERT INTO metric_snapshots (holder, time_s, gauges) VALUES (:holder, :time_s, :gauges) "
    "ON CONFLICT (holder) DO UPDATE SET time_s = excluded.time_s, gauges = excluded.gauges"
)
_SNAPSHOTS = sa.text("SELECT holder, time_s, gauges FROM metric_snapshots WHERE time_s > :since_s")
_FORGET = sa.text("DELETE FROM metric_snapshots WHERE time_s < :before_s OR holder = :holder")
_CLAIM = sa.text(
    "UPDATE metric_snapshots SET time_s = :now_s WHERE holder = :holder AND time_s <= :due_s"
)
_ENTER = sa.text(
    "INSERT INTO metric_snapshots (holder, time_s, gauges) VALUES (:holder, :time_s, :gauges) "
    "ON CONFLICT (holder) DO NOTHING"
)


class Counts(defaultdict[Series, float]):
    """Sums per series."""

    def __init__(self) -> None:
        super().__init__(float)

    def observe(self, family: Family, value: float, *labels: str) -> None:
        """Put `value` into its bucket of a histogram."""
        self[family.name, *labels, family.bucket(value)] += 1
        self[family.name, *labels, SUM] += value


def tally(rows: Iterable[Mapping[str, Any]]) -> Counts:
    """Return what `rows` of the table `requests` count for."""
    counts = Counts()
    for row in rows:
        _count(row, counts)
    return counts


def _count(row: Mapping[str, Any], counts: Counts) -> None:
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
        counts.observe(f.CONFIDENCE, max(row["scores"].values()), policy)
    if row["cached_tokens"] is not None:
        counts[f.CACHED_TOKENS.name, policy] += row["cached_tokens"]
    if row["familiar"] is not None:
        counts[f.UNFAMILIAR.name, policy] += not row["familiar"]
    stages = list(_by_choice(row["stages"] or ()))
    for runs in stages:
        _count_cascades(runs, policy, counts)
        counts[f.FALLBACKS.name, policy] += sum(
            path[:1] == "+" and "." not in path for path in runs
        )
        _count_energy(runs, row["costs"] or {}, counts)
    if status < 400:
        _count_times(row, policy, counts)
        for runs in stages:
            for num_members in _accepted_members(runs):
                counts.observe(f.MEMBERS, num_members, policy)


def _count_models(row: Mapping[str, Any], policy: str, arm: str, counts: Counts) -> None:
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


def _count_times(row: Mapping[str, Any], policy: str, counts: Counts) -> None:
    counts.observe(f.DURATION_S, row["latency_s"], policy)
    ttft_s = row["ttft_s"]
    if not row["stream"] or ttft_s is None:
        return
    counts.observe(f.FIRST_TOKEN_S, ttft_s, policy)
    # Several answers come side by side.
    tokens_after_first = row["output_tokens"] / max(1, row["num_choices"]) - 1
    if tokens_after_first >= 1:
        per_token_s = max(0.0, row["latency_s"] - ttft_s) / tokens_after_first
        counts.observe(f.PER_TOKEN_S, per_token_s, policy)


def _count_energy(
    runs: Mapping[str, Mapping[str, Any]], costs: Mapping[str, Mapping[str, Any]], counts: Counts
) -> None:
    """Count what each engine used per token that it wrote; fused members write one together."""
    written: dict[str, int] = defaultdict(int)
    members: dict[str, set[str]] = defaultdict(set)
    for run in runs.values():
        if "engine" in run:
            written[run["engine"]] += run["output_tokens"]
            members[run["engine"]] |= set(run["members"]) & costs.keys()
    for engine, names in members.items():
        for method in {costs[name]["method"] for name in names}:
            wh = sum(costs[name]["wh"] for name in names if costs[name]["method"] == method)
            if written[engine] and wh:
                joules = wh * 3600 / written[engine]
                counts.observe(f.JOULES_PER_TOKEN, joules, engine, method or f.NONE)


def _count_cascades(runs: Mapping[str, Mapping[str, Any]], policy: str, counts: Counts) -> None:
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
        if "members" in run and accepted.issuperset(way_to(path)):
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


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The gauges that `holder` published at Unix time `time_s`."""

    holder: str
    time_s: float
    gauges: Values


def count_rows(connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Count new `rows` of the table `requests` within the transaction that writes them."""
    try:
        counts = tally(rows)
    except Exception:
        # Metrics must not cost a row.
        logger.exception("metrics: %d rows are not counted", len(rows))
        return
    add_counts(connection, counts)


def add_counts(connection: sa.Connection, counts: Values) -> None:
    """Add `counts` within the caller's transaction.

    Always in the same order, so that transactions of several replicas cannot lock each other out.
    """
    rows = [{"series": _pack(series), "value": counts[series]} for series in sorted(counts)]
    if rows:
        connection.execute(_ADD, rows)


class Store:
    """The store of all replicas that share a ledger. Raises SQLAlchemy's errors."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def counters(self) -> dict[Series, float]:
        """Return every counter."""
        with self.database.connect() as connection:
            return {_unpack(text): value for text, value in connection.execute(_COUNTERS)}

    def publish(
        self, holder: str, gauges: Values, *, now_s: float, counts: Values | None = None
    ) -> None:
        """Replace what `holder` published by `gauges`, and add `counts`."""
        text = json.dumps([[*series, value] for series, value in gauges.items()])
        with writing(self.database) as connection:
            connection.execute(_PUBLISH, {"holder": holder, "time_s": now_s, "gauges": text})
            add_counts(connection, counts or {})

    def snapshots(self, *, since_s: float) -> list[Snapshot]:
        """Return what was published after `since_s`."""
        with self.database.connect() as connection:
            rows = connection.execute(_SNAPSHOTS, {"since_s": since_s}).all()
        return [
            Snapshot(
                holder=holder,
                time_s=time_s,
                gauges={tuple(series): value for *series, value in json.loads(gauges)},
            )
            for holder, time_s, gauges in rows
        ]

    def claim(self, holder: str, *, now_s: float, every_s: float) -> bool:
        """Return whether the caller is to publish as `holder` now: nobody was, for `every_s`."""
        with writing(self.database) as connection:
            connection.execute(_ENTER, {"holder": holder, "time_s": 0.0, "gauges": "[]"})
            due = {"holder": holder, "now_s": now_s, "due_s": now_s - every_s}
            return connection.execute(_CLAIM, due).rowcount == 1

    def forget(self, *, before_s: float, holder: str | None = None) -> None:
        """Delete what was published before `before_s`, and all that `holder` published."""
        with writing(self.database) as connection:
            connection.execute(_FORGET, {"before_s": before_s, "holder": holder})


@lru_cache(maxsize=10_000)
def _pack(series: Series) -> str:
    return json.dumps(series, ensure_ascii=False, separators=(",", ":"))


def _unpack(text: str) -> Series:
    return tuple(json.loads(text))
