"""Chains of stages and their thresholds: accuracy and cost of every choice, exactly.

FrugalGPT (Chen et al. 2023, section 3) maximises accuracy subject to mean cost ≤ budget over
chains and thresholds, on a 40-point grid. Here every empirical quantile of the scores is a
candidate, and all combinations of a chain are evaluated at once from cumulative histograms.
This module knows stages only as columns; it does not know what a model or a query is.

Shape legend: Q queries, K_j candidate thresholds of stage j; a grid has one axis per stage but
the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class StageColumn:
    """What one stage of a chain would do on each of Q queries.

    `quality_Q` is 0 or 1 (or a score in [0, 1]); `cost_Q` >= 0 in any one unit; `score_Q` the
    scorer's P(correct). -inf means that the stage is skipped for that query: its answer is never
    accepted, and its `cost_Q` entry must be 0. The last stage's scores are not looked at.
    """

    quality_Q: Floats
    cost_Q: Floats
    score_Q: Floats


@dataclass(frozen=True, kw_only=True)
class ChainGrid:
    """Mean accuracy and mean cost of a chain for every combination of thresholds.

    `thresholds[j]` are the K_j candidates of stage j, ascending; `accuracy` and `cost` have shape
    [K_0, ..., K_{n-2}] (no axis for a chain of one stage).
    """

    thresholds: tuple[Floats, ...]
    accuracy: Floats
    cost: Floats


def candidate_thresholds(score_Q: Floats, max_thresholds: int) -> Floats:
    """Return the empirical quantiles of the finite scores, ascending: where decisions change.

    All distinct values when there are at most `max_thresholds`, else that many spread evenly
    over the quantiles, the smallest and largest included. A threshold accepts scores >= itself.
    """
    values = np.unique(score_Q[np.isfinite(score_Q)])
    if values.size <= max_thresholds:
        return values if values.size else np.ones(1)
    picks = np.linspace(0, score_Q.size - 1, max_thresholds).round().astype(np.intp)
    return np.unique(np.sort(np.maximum(score_Q, values[0]))[picks])


def evaluate_chain(stages: Sequence[StageColumn], *, max_thresholds: int) -> ChainGrid:
    """Evaluate every combination of candidate thresholds of a chain of one or more stages.

    Stage j answers a query when every earlier stage's score lies below its threshold, and stage
    j's own reaches it (or j is last). Each stage that runs is paid for. Takes
    O(Q + Π K_j) time and memory per stage.
    """
    *gated, last = stages
    thresholds = tuple(candidate_thresholds(stage.score_Q, max_thresholds) for stage in gated)
    # Score in bin k: it reaches thresholds 0..k-1 and no later one.
    bins = [
        np.searchsorted(values, stage.score_Q, side="right")
        for values, stage in zip(thresholds, gated, strict=True)
    ]
    num_queries = last.quality_Q.size
    shape = tuple(values.size for values in thresholds)
    accuracy, cost = np.zeros(shape), np.zeros(shape)
    for j, stage in enumerate(stages):
        cost += _cumulate(bins[:j], shape, stage.cost_Q, accepted_here=False)
        here = j < len(gated)
        accuracy += _cumulate(bins[: j + 1], shape, stage.quality_Q, accepted_here=here)
    return ChainGrid(
        thresholds=thresholds, accuracy=accuracy / num_queries, cost=cost / num_queries
    )


def _cumulate(
    bins: Sequence[Ints], shape: tuple[int, ...], weight_Q: Floats, *, accepted_here: bool
) -> Floats:
    """Sum `weight_Q` over the queries that come this far, for all thresholds; broadcastable.

    A query passes stage i at threshold k when its bin is <= k (it reaches none from k on); with
    `accepted_here` the last axis asks for the opposite, bin > k.
    """
    used = tuple(size + 1 for size in shape[: len(bins)])
    if not bins:
        return np.asarray(weight_Q.sum()).reshape((1,) * len(shape))
    flat = np.ravel_multi_index(tuple(bins), used)
    counts = np.bincount(flat, weight_Q, int(np.prod(used))).astype(np.float64)
    total: Floats = counts.reshape(used)
    for axis in range(len(bins)):
        total = np.cumsum(total, axis=axis)
    if accepted_here:
        total = total[..., -1:] - total
    total = total[tuple(slice(0, size) for size in shape[: len(bins)])]
    return total.reshape(total.shape + (1,) * (len(shape) - len(bins)))


def pareto(cost: Floats, quality: Floats) -> Ints:
    """Return the indices of the points that no other point dominates, by ascending cost.

    Flat arrays of equal length. Of points equal in both, one is kept.
    """
    order = np.lexsort((-quality, cost))
    best = np.maximum.accumulate(quality[order])
    keep = np.ones(order.size, dtype=bool)
    keep[1:] = quality[order][1:] > best[:-1]
    return order[keep]
