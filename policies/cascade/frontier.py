"""The cost-quality frontier: the best chain for every budget.

`search` tries every chain of the candidates, prunes those whose members hardly ever disagree
(FrugalGPT, section 3), and keeps the points that none dominates. It then gates the promising
chains: a stage is skipped for a query whose prior P(correct | query) lies below the gate, so that
the chain goes straight to a later stage when the router already knows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations, product
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from policies.cascade.chains import Floats, StageColumn, candidate_thresholds, evaluate_chain
from policies.cascade.chains import pareto as pareto_indices
from policies.errors import PolicyError

Chain: TypeAlias = tuple[int, ...]
# The scores of a stage, given the stages before it and for which queries they ran:
# (stage, earlier stages E, ran_QE) -> score_Q.
ScoreOf: TypeAlias = Callable[[int, Chain, NDArray[np.bool_]], Floats]


@dataclass(frozen=True, kw_only=True)
class CascadePoint:
    """One choice on the frontier: a chain, its thresholds and gates, and what they gave.

    `thresholds` and `gates` have one entry per stage but the last, each in [0, 1]; a gate of 0
    never skips. `cost` is the mean per query in the table's unit.
    """

    stages: tuple[str, ...]
    thresholds: tuple[float, ...]
    gates: tuple[float, ...]
    accuracy: float
    cost: float


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
    model_QS: np.ndarray[tuple[int, int], np.dtype[np.intp]]
    answer_QS: np.ndarray[tuple[int, int], np.dtype[np.intp]]

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
    ungated = _frontier(point for chain in chains for point in evaluate(chain, _no_gates(chain)))
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


def within_budget(frontier: Sequence[CascadePoint], budget: float) -> CascadePoint:
    """Return the most accurate point whose mean cost is at most `budget`, the cheaper on a tie.

    Raises `PolicyError` that names the cheapest cost when nothing is affordable.
    """
    affordable = [point for point in frontier if point.cost <= budget * (1 + 1e-12)]
    if not affordable:
        cheapest = min(point.cost for point in frontier)
        raise PolicyError(f"budget: {budget:g} is below the cheapest chain's cost, {cheapest:g}")
    return max(affordable, key=lambda point: (point.accuracy, -point.cost))


def thin(frontier: Sequence[CascadePoint], tolerance: float) -> tuple[CascadePoint, ...]:
    """Leave out points that a better one follows within a share `tolerance` of their cost.

    Costs that close differ by the lengths of answers, not by the chain.
    """
    kept: list[CascadePoint] = []
    for point in reversed(frontier):
        if not kept or kept[-1].cost > point.cost * (1 + tolerance):
            kept.append(point)
    return tuple(reversed(kept))


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
        for flat in pareto_indices(cost, accuracy):
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
    return tuple(every[index] for index in pareto_indices(cost, accuracy))


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


def _no_gates(chain: Chain) -> tuple[float, ...]:
    return (0.0,) * (len(chain) - 1)
