"""The cost-quality frontier: every chain of stages, every threshold, the best for every budget.

FrugalGPT (Chen et al. 2023, section 3) maximises accuracy subject to mean cost ≤ budget over
chains and thresholds, on a 40-point grid. Here every empirical quantile of the scores is a
candidate, and all combinations of a chain are evaluated at once from cumulative histograms.
`search` tries every chain of the candidates, prunes those whose members hardly ever disagree, and
keeps the points that none dominates. It then gates the promising chains: a stage is skipped for a
query whose prior P(correct | query) lies below the gate, so that the chain goes straight to a later
stage when the router already knows.

Stages are columns here; what a model or a query is, it does not know.

Shape legend: Q queries, S stages, E earlier stages, K_j candidate thresholds of stage j; a grid has
one axis per stage but the last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations, product
from typing import TypeAlias

import numpy as np

from policies.cascade.answers import Floats, Ints, Rows
from policies.cascade.learned import CascadePoint
from policies.errors import PolicyError

Chain: TypeAlias = tuple[int, ...]
# The scores of a stage, given the stages before it and for which queries they ran:
# (stage, earlier stages E, ran_QE) -> score_Q.
ScoreOf: TypeAlias = Callable[[int, Chain, Rows], Floats]


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


@dataclass(frozen=True, kw_only=True)
class StageTable:
    """What the candidates (S of them) did on Q queries.

    `quality_QS` in [0, 1], `cost_QS` >= 0, `prior_QS` P(correct | query) before any answer.
    `model_QS` says which model stands behind a stage for a query (an id; stages that depend on
    the query share ids with the model they resolve to): a stage that a later one repeats is
    skipped. `answer_QS` holds an id per distinct answer of a query, for the disagreement.
    """

    names: tuple[str, ...]
    quality_QS: Floats
    cost_QS: Floats
    prior_QS: Floats
    model_QS: Ints
    answer_QS: Ints

    @property
    def num_queries(self) -> int:
        """Q."""
        return int(self.quality_QS.shape[0])


def search(
    table: StageTable,
    score_of: ScoreOf,
    *,
    max_stages: int = 3,
    max_thresholds: int = 128,
    min_disagreement: float = 0.02,
    num_gates: int = 8,
    last: Collection[str] | None = None,
) -> tuple[CascadePoint, ...]:
    """Return the whole cost-quality frontier, by ascending cost.

    `max_thresholds` bounds the candidate thresholds per stage in chains of three and more; chains
    of two use every distinct score. A chain is pruned when some stage's answer differs from the
    stage's before it on less than `min_disagreement` of the queries. `num_gates` candidate gates
    per stage are tried on the chains of the ungated frontier; 0 turns gating off. `last` names the
    stages that a chain may end with; None: any.
    """
    if table.num_queries == 0:
        raise PolicyError("the cascade learner needs at least one query")
    evaluate = _Evaluator(table, score_of, max_thresholds)
    ends = {index for index, name in enumerate(table.names) if last is None or name in last}
    chains = tuple(
        chain for chain in _chains(table, max_stages, min_disagreement) if chain[-1] in ends
    )
    ungated = _frontier(
        point for chain in chains for point in evaluate(chain, (0.0,) * (len(chain) - 1))
    )
    if num_gates == 0:
        return ungated
    position = {name: index for index, name in enumerate(table.names)}
    survivors = (tuple(position[name] for name in point.stages) for point in ungated)
    pairs = (chain for chain in chains if len(chain) == 2)
    gated = (
        point
        for chain in dict.fromkeys((*survivors, *pairs))
        for gates in _gates(table, chain, num_gates)
        for point in evaluate(chain, gates)
    )
    return _frontier([*ungated, *gated])


def thin(frontier: Sequence[CascadePoint], tolerance: float) -> tuple[CascadePoint, ...]:
    """Leave out points that a better one follows within a share `tolerance` of their cost.

    Costs that close differ by the lengths of answers, not by the chain.
    """
    kept: list[CascadePoint] = []
    for point in reversed(frontier):
        if not kept or kept[-1].cost > point.cost * (1 + tolerance):
            kept.append(point)
    return tuple(reversed(kept))


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


def columns(
    table: StageTable, score_of: ScoreOf, chain: Chain, gates: Sequence[float]
) -> tuple[StageColumn, ...]:
    """Return the chain's stages as columns, with gated and repeated stages skipped."""
    result: list[StageColumn] = []
    ran_QE = np.zeros((table.num_queries, len(chain)), dtype=bool)
    for j, stage in enumerate(chain):
        cost_Q = table.cost_QS[:, stage]
        score_Q = score_of(stage, chain[:j], ran_QE[:, :j])
        ran_QE[:, j] = True
        if j < len(chain) - 1:
            later = table.model_QS[:, chain[j + 1 :]]
            skip_Q = (later == table.model_QS[:, [stage]]).any(axis=1)
            skip_Q |= table.prior_QS[:, stage] < gates[j]
            ran_QE[:, j] = ~skip_Q
            cost_Q = np.where(skip_Q, 0.0, cost_Q)
            score_Q = np.where(skip_Q, -np.inf, score_Q)
        result.append(
            StageColumn(quality_Q=table.quality_QS[:, stage], cost_Q=cost_Q, score_Q=score_Q)
        )
    return tuple(result)


@dataclass(frozen=True)
class _Evaluator:
    table: StageTable
    score_of: ScoreOf
    max_thresholds: int

    def __call__(self, chain: Chain, gates: tuple[float, ...]) -> list[CascadePoint]:
        stages = columns(self.table, self.score_of, chain, gates)
        limit = self.max_thresholds if len(chain) > 2 else self.table.num_queries
        grid = evaluate_chain(stages, max_thresholds=limit)
        cost, accuracy = grid.cost.ravel(), grid.accuracy.ravel()
        points = []
        for flat in pareto(cost, accuracy):
            places = np.unravel_index(int(flat), grid.cost.shape)
            points.append(
                CascadePoint(
                    stages=tuple(self.table.names[stage] for stage in chain),
                    thresholds=tuple(
                        float(values[k]) for values, k in zip(grid.thresholds, places, strict=True)
                    ),
                    gates=gates,
                    accuracy=float(accuracy[flat]),
                    cost=float(cost[flat]),
                )
            )
        return points


def _frontier(points: Iterable[CascadePoint]) -> tuple[CascadePoint, ...]:
    # Shorter chains first, so that of equal points the simpler is kept.
    every = sorted(points, key=lambda point: (len(point.stages), sum(point.gates)))
    cost = np.array([point.cost for point in every])
    accuracy = np.array([point.accuracy for point in every])
    return tuple(every[index] for index in pareto(cost, accuracy))


def _chains(table: StageTable, max_stages: int, min_disagreement: float) -> Iterator[Chain]:
    num_stages = len(table.names)
    answer_QS = table.answer_QS
    disagreement = np.array(
        [[(answer_QS[:, a] != answer_QS[:, b]).mean() for b in range(num_stages)]
         for a in range(num_stages)]
    )  # fmt: skip
    for length in range(1, max_stages + 1):
        for chain in permutations(range(num_stages), length):
            if all(disagreement[a, b] >= min_disagreement for a, b in pairwise(chain)):
                yield chain


def _gates(table: StageTable, chain: Chain, num_gates: int) -> Iterator[tuple[float, ...]]:
    choices = [
        (0.0, *candidate_thresholds(table.prior_QS[:, stage], num_gates + 1)[1:].tolist())
        for stage in chain[:-1]
    ]
    for gates in product(*choices):
        if any(gates):
            yield gates
