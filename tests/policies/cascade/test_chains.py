"""The threshold search against brute force."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.cascade.frontier import StageColumn, candidate_thresholds, evaluate_chain, pareto


def random_stages(seed: int, num_stages: int, num_queries: int) -> list[StageColumn]:
    """Draw stages with tied scores and some skipped queries."""
    rng = np.random.default_rng(seed)
    stages = []
    for _ in range(num_stages):
        skipped = rng.random(num_queries) < 0.2
        score = rng.integers(0, 7, num_queries) / 7
        stages.append(
            StageColumn(
                quality_Q=rng.integers(0, 2, num_queries).astype(float),
                cost_Q=np.where(skipped, 0.0, rng.random(num_queries)),
                score_Q=np.where(skipped, -np.inf, score),
            )
        )
    return stages


def simulate(stages: list[StageColumn], thresholds: tuple[float, ...]) -> tuple[float, float]:
    """Run the chain query by query, the way the executor does."""
    quality = cost = 0.0
    num_queries = stages[0].quality_Q.size
    for q in range(num_queries):
        for j, stage in enumerate(stages):
            cost += stage.cost_Q[q]
            if j == len(stages) - 1 or stage.score_Q[q] >= thresholds[j]:
                quality += stage.quality_Q[q]
                break
    return quality / num_queries, cost / num_queries


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 25))
def test_every_grid_point_equals_a_simulation(seed: int, num_stages: int, num_queries: int) -> None:
    """Accuracy and cost of every threshold combination equal a query-by-query run."""
    stages = random_stages(seed, num_stages, num_queries)
    grid = evaluate_chain(stages, max_thresholds=100)
    for places in product(*(range(values.size) for values in grid.thresholds)):
        thresholds = tuple(
            float(values[k]) for values, k in zip(grid.thresholds, places, strict=True)
        )
        accuracy, cost = simulate(stages, thresholds)
        assert grid.accuracy[places] == pytest.approx(accuracy)
        assert grid.cost[places] == pytest.approx(cost)


def test_no_threshold_beats_the_empirical_quantiles() -> None:
    """A dense sweep of thresholds finds nothing that the candidates miss (seed 3)."""
    stages = random_stages(3, 3, 40)
    grid = evaluate_chain(stages, max_thresholds=100)
    points = set(zip(grid.accuracy.ravel().round(9), grid.cost.ravel().round(9), strict=True))
    for thresholds in product(np.linspace(0, 6 / 7, 43), repeat=2):
        accuracy, cost = simulate(stages, thresholds)
        assert (round(accuracy, 9), round(cost, 9)) in points


def test_few_quantiles_keep_both_ends() -> None:
    """A bounded number of candidates still spans the scores from the smallest to the largest."""
    scores = np.append(np.linspace(0, 1, 1001), -np.inf)
    values = candidate_thresholds(scores, 11)
    assert values.size <= 11
    assert values[0] == 0
    assert values[-1] == 1
    assert np.all(np.diff(values) > 0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30))
def test_pareto_keeps_exactly_the_undominated(points: list[tuple[int, int]]) -> None:
    """Every kept point is dominated by none, and every dropped one by (or equal to) a kept one."""
    cost = np.array([point[0] for point in points], float)
    quality = np.array([point[1] for point in points], float)
    kept = {(cost[i], quality[i]) for i in pareto(cost, quality)}
    undominated = {
        (c, a)
        for c, a in points
        if not any((d <= c and b >= a and (d, b) != (c, a)) for d, b in points)
    }
    assert kept == undominated
