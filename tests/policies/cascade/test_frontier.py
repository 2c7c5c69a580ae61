"""The frontier over chains: against brute force, with pruning, gates and repeated stages."""

from itertools import permutations, product

import numpy as np
import pytest

from policies.cascade.frontier import Chain, ScoreOf, StageTable, columns, search, thin
from policies.cascade.learned import CascadePoint, within_budget
from policies.errors import PolicyError

NAMES = ("ada", "bob", "cyd")


def random_table(seed: int, num_queries: int = 18) -> tuple[StageTable, ScoreOf]:
    """Draw three stages whose scores are informative, coarse and independent of the chain."""
    rng = np.random.default_rng(seed)
    num_stages = len(NAMES)
    prior = rng.integers(1, 6, (num_queries, num_stages)) / 6
    quality = (rng.random((num_queries, num_stages)) < prior).astype(float)
    score = np.clip(0.6 * quality + 0.5 * rng.random((num_queries, num_stages)), 0, 1).round(1)
    table = StageTable(
        names=NAMES,
        quality_QS=quality,
        cost_QS=np.array([1.0, 2.0, 5.0]) * rng.uniform(0.5, 1.5, (num_queries, 1)),
        prior_QS=prior,
        model_QS=np.tile(np.arange(num_stages), (num_queries, 1)),
        answer_QS=rng.integers(0, 3, (num_queries, num_stages)).astype(np.intp),
    )
    return table, lambda stage, earlier, ran: score[:, stage]


def replay(
    table: StageTable, score_of: ScoreOf, chain: Chain, thresholds: tuple[float, ...]
) -> tuple[float, float]:
    """Run a chain query by query: (accuracy, mean cost)."""
    accuracy = cost = 0.0
    for q in range(table.num_queries):
        for j, stage in enumerate(chain):
            cost += table.cost_QS[q, stage]
            if (
                j == len(chain) - 1
                or score_of(stage, chain[:j], np.ones((1, j), bool))[q] >= thresholds[j]
            ):
                accuracy += table.quality_QS[q, stage]
                break
    return accuracy / table.num_queries, cost / table.num_queries


@pytest.mark.parametrize("seed", range(4))
def test_no_chain_and_thresholds_beat_the_frontier(seed: int) -> None:
    """Brute force over all chains of up to three stages finds no better point at any budget."""
    table, score_of = random_table(seed)
    frontier = search(table, score_of, num_gates=0, min_disagreement=0)
    grid = np.linspace(0, 1, 11)
    for length in (1, 2, 3):
        for chain in permutations(range(3), length):
            for thresholds in product(grid, repeat=length - 1):
                accuracy, cost = replay(table, score_of, chain, thresholds)
                assert within_budget(frontier, cost + 1e-9).accuracy >= accuracy - 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_every_point_replays_to_its_own_figures(seed: int) -> None:
    """Each point of the frontier, gates included, gives the accuracy and cost that it states."""
    table, score_of = random_table(seed)
    for point in search(table, score_of):
        chain = tuple(NAMES.index(name) for name in point.stages)
        stages = columns(table, score_of, chain, point.gates)
        accuracy = cost = 0.0
        for q in range(table.num_queries):
            for j, stage in enumerate(stages):
                cost += stage.cost_Q[q]
                if j == len(stages) - 1 or stage.score_Q[q] >= point.thresholds[j]:
                    accuracy += stage.quality_Q[q]
                    break
        assert point.accuracy == pytest.approx(accuracy / table.num_queries)
        assert point.cost == pytest.approx(cost / table.num_queries)


def test_the_frontier_rises() -> None:
    """Along the frontier, more cost always buys more accuracy (seed 7)."""
    table, score_of = random_table(7, num_queries=200)
    frontier = search(table, score_of)
    assert len(frontier) > 3
    costs = [point.cost for point in frontier]
    accuracies = [point.accuracy for point in frontier]
    assert costs == sorted(set(costs))
    assert accuracies == sorted(set(accuracies))


def test_gates_pay_when_the_prior_knows() -> None:
    """With a perfect prior a gated chain reaches the oracle at the cost of the stage it picks."""
    quality = np.array([[1.0, 1.0]] * 10 + [[0.0, 1.0]] * 10)
    table = StageTable(
        names=("small", "large"),
        quality_QS=quality,
        cost_QS=np.tile([1.0, 10.0], (20, 1)),
        prior_QS=np.where(quality > 0, 0.9, 0.1),
        model_QS=np.tile(np.arange(2), (20, 1)),
        answer_QS=np.where(quality > 0, 0, 1).astype(np.intp),
    )
    blind: ScoreOf = lambda stage, earlier, ran: np.full(20, 0.5)  # noqa: E731
    assert within_budget(search(table, blind, num_gates=0), 6).accuracy < 1
    best = within_budget(search(table, blind), 6)
    assert (best.accuracy, best.cost) == (1.0, 5.5)
    assert best.stages == ("small", "large")


def test_stages_that_never_disagree_are_pruned() -> None:
    """A chain of two stages with the same answers everywhere is not tried."""
    table, score_of = random_table(1)
    same = StageTable(
        names=table.names,
        quality_QS=table.quality_QS,
        cost_QS=table.cost_QS,
        prior_QS=table.prior_QS,
        model_QS=table.model_QS,
        answer_QS=np.zeros_like(table.answer_QS),
    )
    assert all(len(point.stages) == 1 for point in search(same, score_of))


def test_a_stage_that_a_later_one_repeats_is_free() -> None:
    """Where a query-dependent stage resolves to a later stage's model, it costs nothing."""
    table, score_of = random_table(2)
    routed = StageTable(
        names=table.names,
        quality_QS=table.quality_QS,
        cost_QS=table.cost_QS,
        prior_QS=table.prior_QS,
        model_QS=np.where(np.arange(18)[:, None] < 9, [[1, 1, 2]], [[0, 1, 2]]),
        answer_QS=table.answer_QS,
    )
    first, _ = columns(routed, score_of, (0, 1), (0.0,))
    assert np.all(first.cost_Q[:9] == 0)
    assert np.all(np.isneginf(first.score_Q[:9]))
    assert np.all(first.cost_Q[9:] == table.cost_QS[9:, 0])


def test_an_unaffordable_budget_names_the_cheapest_cost() -> None:
    """A budget below the cheapest chain is refused with that chain's cost."""
    point = CascadePoint(stages=("ada",), thresholds=(), gates=(), accuracy=0.5, cost=2.0)
    with pytest.raises(PolicyError, match="cheapest chain's cost, 2"):
        within_budget([point], 1.0)


def test_thinning_drops_what_a_better_point_follows_closely() -> None:
    """Of points whose costs are about the same the best one stays; the others are untouched."""

    def point(cost: float, accuracy: float) -> CascadePoint:
        return CascadePoint(stages=("ada",), thresholds=(), gates=(), accuracy=accuracy, cost=cost)

    frontier = [point(1.0, 0.5), point(1.001, 0.6), point(1.004, 0.7), point(2.0, 0.8)]
    assert thin(frontier, 0.005) == (frontier[2], frontier[3])
    assert thin(frontier, 0.0) == tuple(frontier)
