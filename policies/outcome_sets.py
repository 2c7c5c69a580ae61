"""Outcomes brought together, freed of repeats, divided, and summed up before anybody learns.

Shape legend: Q queries, M models.
"""

from __future__ import annotations

import hashlib
import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import combinations, permutations
from typing import Any, Final

import numpy as np

from policies.errors import OutcomesError
from policies.outcomes import Outcome, score_table

NUM_SHINGLE_WORDS: Final = 4
LIKENESS: Final = 0.8
TRAIN, TEST = "train", "test"


def merge(parts: Iterable[Sequence[Outcome]]) -> list[Outcome]:
    """Return one outcome per query, with what all `parts` know of it; the last word counts.

    So models that were asked at different times, or graded again, come together. What a part says
    of a query again is another draw, and joins the others' draw of the same number.
    """
    found: dict[tuple[str, int], Outcome] = {}
    for part in parts:
        seen: Counter[str] = Counter()
        for outcome in part:
            seen[outcome.query] += 1
            key = outcome.query, seen[outcome.query]
            found[key] = _joined(found[key], outcome) if key in found else outcome
    return list(found.values())


def _joined(old: Outcome, new: Outcome) -> Outcome:
    changed: dict[str, Any] = {}
    for field in fields(Outcome):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if isinstance(before, dict):
            changed[field.name] = {**before, **after}
        elif after not in ("", (), None):
            changed[field.name] = after
    return replace(old, **{**changed, "format": max(old.format, new.format)})


def dedupe(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes without those whose query (nearly) repeats an earlier one."""
    alike = near_duplicates([outcome.query for outcome in outcomes])
    kept: set[int] = set()
    for row in range(len(outcomes)):
        if not alike.get(row, set()) & kept:
            kept.add(row)
    return [outcomes[row] for row in sorted(kept)]


def divide(outcomes: Sequence[Outcome], *, test_share: float = 0.3, seed: int = 0) -> list[Outcome]:
    """Return the outcomes, each with the split `train` or `test`.

    Drawn by a hash of the query, so a query stays where it is when others join; queries that
    (nearly) repeat each other go together, with the least of their hashes.
    """
    if not 0 < test_share < 1:
        raise OutcomesError(f"test share: {test_share} is not between 0 and 1")
    group_Q = _groups(outcomes)
    least = _least_draws(outcomes, group_Q, seed)
    sizes = Counter(group_Q)
    # The least of n draws is below this as often as one draw is below the share.
    return [
        replace(outcome, split=TEST if least[at] < 1 - (1 - test_share) ** sizes[at] else TRAIN)
        for outcome, at in zip(outcomes, group_Q, strict=True)
    ]


def fold_names(outcomes: Sequence[Outcome], *, num_folds: int, seed: int = 0) -> list[str]:
    """Return the fold of each outcome, by a hash of its query; repeats are in the same one."""
    group_Q = _groups(outcomes)
    least = _least_draws(outcomes, group_Q, seed)
    order = {at: rank for rank, at in enumerate(sorted(least, key=least.__getitem__))}
    return [f"fold {order[at] % num_folds}" for at in group_Q]


def _groups(outcomes: Sequence[Outcome]) -> list[int]:
    """Return a number for each outcome: the same where queries repeat each other, over others."""
    group = list(range(len(outcomes)))

    def root(row: int) -> int:
        while group[row] != row:
            group[row] = group[group[row]]
            row = group[row]
        return row

    for row, others in near_duplicates([outcome.query for outcome in outcomes]).items():
        for other in others:
            group[root(row)] = root(other)
    return [root(row) for row in range(len(outcomes))]


def _least_draws(
    outcomes: Sequence[Outcome], group_Q: Sequence[int], seed: int
) -> dict[int, float]:
    """Return for each group the least of its queries' draws in [0, 1)."""
    least: dict[int, float] = {}
    for outcome, at in zip(outcomes, group_Q, strict=True):
        told = hashlib.sha256(f"{seed}:{outcome.query}".encode("utf-8", "replace")).digest()
        draw = int.from_bytes(told[:8], "big") / 2**64
        least[at] = min(least.get(at, 1.0), draw)
    return least


@dataclass(frozen=True, kw_only=True)
class ModelStats:
    """What outcomes hold of one model; means over the queries where it is known, else None."""

    name: str
    num_scored: int
    num_missing: int
    score: float
    usd: float | None
    output_tokens: float | None
    latency_s: float | None


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What outcomes hold, and whether routing between their models can pay.

    The rest counts queries with every model's score: `ties` is the share where all score the same,
    `best_single` the best model's mean score, `task_oracle` that of the best model of each task
    (None for a single task), `oracle` that of the best model of each query.
    """

    models: tuple[ModelStats, ...]
    num_queries: int
    num_complete: int
    tasks: Mapping[str, int]
    ties: float
    best_single: float
    task_oracle: float | None
    oracle: float


def summarise(outcomes: Sequence[Outcome]) -> Stats:
    """Return the statistics of `outcomes`; NaN where no query has every model's score."""
    table = score_table(outcomes)
    known_QM = ~np.isnan(table.scores_QM)
    complete_Q = known_QM.all(1)
    scores_QM = table.scores_QM[complete_Q]
    tasks_Q = np.array([o.tags[0] if o.tags else "" for o in outcomes])[complete_Q]
    nan = float("nan")
    some = len(scores_QM) > 0
    tasks = np.unique(tasks_Q)
    by_task = [scores_QM[tasks_Q == task].mean(0).max() * (tasks_Q == task).sum() for task in tasks]
    return Stats(
        models=tuple(
            ModelStats(
                name=name,
                num_scored=int(known_QM[:, m].sum()),
                num_missing=int((~known_QM[:, m]).sum()),
                score=float(np.nanmean(table.scores_QM[:, m])),
                usd=_mean(o.costs.get(name) for o in outcomes),
                output_tokens=_mean(o.output_tokens.get(name) for o in outcomes),
                latency_s=_mean(o.latencies.get(name) for o in outcomes),
            )
            for m, name in enumerate(table.models)
        ),
        num_queries=len(outcomes),
        num_complete=int(complete_Q.sum()),
        tasks=Counter(o.tags[0] for o in outcomes if o.tags),
        ties=float((np.ptp(scores_QM, axis=1) == 0).mean()) if some else nan,
        best_single=float(scores_QM.mean(0).max()) if some else nan,
        task_oracle=float(sum(by_task) / len(scores_QM)) if len(tasks) > 1 else None,
        oracle=float(scores_QM.max(1).mean()) if some else nan,
    )


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of the `num_pairs` of answers that grader `one` tells apart, the share that `other` orders
    alike; its ties count half."""

    one: str
    other: str
    num_pairs: int
    share: float


def agreements(outcomes: Sequence[Outcome]) -> list[Agreement]:
    """Return how far graders agree on which of two answers to a query is better, each way round.

    So a judge is held against references: `one` is the grader with the references.
    """
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for outcome in outcomes:
        for (one, mine), (other, theirs) in permutations(outcome.grades.items(), 2):
            for a, b in combinations(sorted(set(mine) & set(theirs)), 2):
                if mine[a] != mine[b]:
                    order = (theirs[a] - theirs[b]) * (mine[a] - mine[b])
                    found[one, other].append(0.5 if order == 0 else float(order > 0))
    return [
        Agreement(one=one, other=other, num_pairs=len(shares), share=sum(shares) / len(shares))
        for (one, other), shares in found.items()
    ]


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def near_duplicates(texts: Sequence[str]) -> dict[int, set[int]]:
    """Return, for every row of `texts` that (nearly) repeats others, the rows of those.

    Queries are near-duplicates if the Jaccard similarity of their sets of four-word shingles
    (upper and lower case, punctuation and white space ignored) is at least 0.8. Candidates come
    from prefix filtering (Chaudhuri, Ganti & Kaushik 2006): with all sets in one order, rarest
    shingle first, two such sets share a shingle among the first n - ⌈0.8·n⌉ + 1 of each. Exact.
    """
    sets = [_shingles(text) for text in texts]
    frequency = Counter(shingle for shingles in sets for shingle in shingles)
    earlier: dict[int, list[int]] = defaultdict(list)
    alike: dict[int, set[int]] = defaultdict(set)
    for row, shingles in enumerate(sets):
        prefix = _prefix(shingles, frequency)
        for other in {other for shingle in prefix for other in earlier[shingle]}:
            if _likeness(shingles, sets[other]) >= LIKENESS:
                alike[row].add(other)
                alike[other].add(row)
        for shingle in prefix:
            earlier[shingle].append(row)
    return dict(alike)


def _prefix(shingles: frozenset[int], frequency: Mapping[int, int]) -> list[int]:
    num_shingles = len(shingles)
    length = num_shingles - math.ceil(LIKENESS * num_shingles) + 1
    return sorted(shingles, key=lambda shingle: (frequency[shingle], shingle))[:length]


def _shingles(text: str) -> frozenset[int]:
    words = re.findall(r"\w+", text.lower()) or [text.strip()]  # emoji, say
    last = max(1, len(words) - NUM_SHINGLE_WORDS + 1)
    return frozenset(
        zlib.crc32(" ".join(words[i : i + NUM_SHINGLE_WORDS]).encode("utf-8", "replace"))
        for i in range(last)
    )


def _likeness(one: frozenset[int], other: frozenset[int]) -> float:
    if min(len(one), len(other)) < LIKENESS * max(len(one), len(other)):
        return 0.0  # too different in size to be worth intersecting
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)
