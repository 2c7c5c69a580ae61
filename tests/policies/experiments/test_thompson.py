"""Thompson sampling moves weight to the best arm, never below the floor."""

from __future__ import annotations

import numpy as np
import pytest

from policies.experiments.assignment import adaptive_weights
from policies.experiments.effects import ArmMean
from policies.experiments.experiment import Allocation, Arm, Experiment
from policies.experiments.metrics import Goal


def experiment(metric: str = "quality") -> Experiment:
    """Four equal arms with a floor of 5%."""
    arms = tuple(Arm(name=f"a{i}", policy="p", weight=0.25) for i in range(4))
    allocation = Allocation(kind="thompson", floor=0.05)
    return Experiment(name="e", arms=arms, primary=Goal(metric=metric), allocation=allocation)


def means(*values: float, se: float = 0.02, units: int = 100) -> dict[str, ArmMean]:
    """Means of the four arms."""
    return {f"a{i}": ArmMean(mean=v, se=se, num_units=units) for i, v in enumerate(values)}


def test_the_best_arm_gets_most_and_nobody_falls_below_the_floor() -> None:
    """A clear winner takes all that the floors leave (seed 1)."""
    rng = np.random.default_rng(1)
    weights = adaptive_weights(experiment(), means(0.5, 0.5, 0.9, 0.5), rng=rng)
    assert weights == pytest.approx({"a0": 0.05, "a1": 0.05, "a2": 0.85, "a3": 0.05}, abs=1e-9)


def test_lower_is_better_for_costs() -> None:
    """Where the metric is a cost, the cheapest arm wins (seed 2)."""
    rng = np.random.default_rng(2)
    weights = adaptive_weights(experiment("usd"), means(0.5, 0.1, 0.9, 0.5), rng=rng)
    assert max(weights, key=lambda name: weights[name]) == "a1"


def test_equal_arms_share() -> None:
    """Equal posteriors give equal weights, up to 4,096 draws' noise of 4 sigma (seed 3)."""
    weights = adaptive_weights(
        experiment(), means(0.5, 0.5, 0.5, 0.5), rng=np.random.default_rng(3)
    )
    assert weights == pytest.approx(dict.fromkeys(weights, 0.25), abs=0.03)
    assert sum(weights.values()) == pytest.approx(1)


@pytest.mark.parametrize("early", [means(0.5, 0.9, 0.5, 0.5, units=29), means(0.9, 0.5, 0.1)])
def test_too_little_data_keeps_the_configured_weights(early: dict[str, ArmMean]) -> None:
    """Below 30 units in an arm, or with an arm unseen, nothing moves."""
    weights = adaptive_weights(experiment(), early, rng=np.random.default_rng(4))
    assert weights == dict.fromkeys(weights, 0.25)


def test_it_finds_the_best_of_four_and_earns_more_than_equal_shares() -> None:
    """Simulated to the end (seed 5), the best arm gets most traffic in at least 18 of 20 runs."""
    rates = np.array([0.5, 0.55, 0.7, 0.6])
    rng = np.random.default_rng(5)
    right = 0
    for _ in range(20):
        wins, shown = np.zeros(4), np.zeros(4)
        weights = dict.fromkeys(("a0", "a1", "a2", "a3"), 0.25)
        for _ in range(30):
            drawn = rng.multinomial(100, list(weights.values()))
            shown += drawn
            wins += rng.binomial(drawn, rates)
            mean = wins / shown
            seen = {
                f"a{i}": ArmMean(
                    mean=float(mean[i]),
                    se=float(np.sqrt(mean[i] * (1 - mean[i]) / shown[i])),
                    num_units=int(shown[i]),
                )
                for i in range(4)
            }
            weights = adaptive_weights(experiment(), seen, rng=rng)
        right += shown.argmax() == 2
        assert (wins.sum() / shown.sum()) > rates.mean()
    assert right >= 18
