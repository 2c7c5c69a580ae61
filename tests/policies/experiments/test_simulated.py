"""Switchback and best arm, simulated: what is claimed of them holds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from policies.experiments.analysis import analyse
from policies.experiments.assignment import Assigner, Visit
from policies.experiments.effects import ArmMean
from policies.experiments.experiment import Experiment, Switchback
from policies.experiments.sequences import known_best
from tests.bench.experiments_simulated import TRUTH_S, queue, race, shared_machine

BEST = (0.5, 0.6, 0.45, 0.5)


def test_blocks_see_what_a_split_of_requests_cannot() -> None:
    """On a shared queue the split misses what theory says, surely; blocks find it (seed 2)."""
    found = {}
    for unit in ("request", "block"):
        experiment = shared_machine(unit)
        [found[unit]] = analyse(experiment, queue(experiment, days=4, seed=2)).primary
    assert found["request"].high < 0.5 < TRUTH_S
    assert 0 < found["block"].low < TRUTH_S < found["block"].high


def test_a_block_belongs_to_one_arm() -> None:
    """All requests of a block get one arm, both arms get blocks, and each block washes out."""

    def arms(experiment: Experiment, minutes: range) -> list[tuple[str | None, str]]:
        assigner = Assigner([experiment])
        found = [
            assigner.assign(Visit(request_id=f"r{m}", model="auto"), now_s=60.0 * m)
            for m in minutes
        ]
        return [(one.arm, one.unit) for one in found if one is not None]

    experiment = shared_machine("block")
    seen = arms(experiment, range(6000))
    by_unit: dict[str, set[str]] = {}
    for arm, unit in seen:
        if arm is not None:
            by_unit.setdefault(unit, set()).add(arm)
    assert all(len(of_block) == 1 for of_block in by_unit.values())
    assert 299 <= len(by_unit) <= 301
    shares = sum(of_block == {"slower"} for of_block in by_unit.values()) / len(by_unit)
    low, high = binom.interval(0.9999, len(by_unit), 0.5)
    assert low <= shares * len(by_unit) <= high
    washed = sum(arm is None for arm, _ in seen) / len(seen)
    assert washed == pytest.approx(5 / 20, abs=0.01)


def test_a_blocks_number_changes_once_per_block() -> None:
    """Every twenty minutes, shifted by the offset; the first five of them wash out."""
    blocks = Switchback(block_minutes=20, washout_minutes=5)
    assert blocks.block(0.0, 0.0) == (0, True)
    assert blocks.block(299.0, 0.0) == (0, True)
    assert blocks.block(301.0, 0.0) == (0, False)
    assert blocks.block(1199.0, 0.5) == (1, False)
    assert blocks.block(601.0, 0.5) == (1, True)


@pytest.mark.parametrize("kind", ["even", "top-two"])
def test_the_best_arm_is_wrong_no_more_often_than_promised(kind: str) -> None:
    """Of 150 races with a look after every 200 units, errors are no surprise at 10% (seed 11)."""
    ran = [race(BEST, kind=kind, rng=np.random.default_rng([11, n])) for n in range(150)]
    wrong = sum(one.found != "arm 1" for one in ran)
    assert wrong <= binom.ppf(0.999, len(ran), 0.1)


def test_equal_arms_are_rarely_told_apart() -> None:
    """Where no arm is better, somebody is called best in at most 10% of races (seed 12)."""
    ran = [
        race((0.5, 0.5, 0.5), kind="top-two", rng=np.random.default_rng([12, n]), most=15_000)
        for n in range(100)
    ]
    assert sum(one.found is not None for one in ran) <= binom.ppf(0.999, len(ran), 0.1)


def test_top_two_needs_fewer_units_than_an_even_split() -> None:
    """Where two arms are close and six far behind, at least a quarter fewer (seed 13)."""
    rates = (0.60, 0.66, 0.40, 0.40, 0.45, 0.40, 0.45, 0.50)
    units = {
        kind: np.mean(
            [
                race(rates, kind=kind, rng=np.random.default_rng([13, n])).num_units
                for n in range(25)
            ]
        )
        for kind in ("even", "top-two")
    }
    assert units["top-two"] < 0.75 * units["even"]


def test_the_evidence_is_the_smallest_over_equal_means() -> None:
    """The closed form decides as a search over all means that both arms may share does."""
    a, b = ArmMean(mean=0.6, se=0.02, num_units=600), ArmMean(mean=0.5, se=0.03, num_units=300)
    from policies.experiments import sequences

    for delta in (0.2, 0.05, 0.01, 1e-4):
        rho = sequences.rho_for(0.05, alpha=delta)
        shared = np.linspace(0.4, 0.7, 30_001)
        log_m = np.zeros_like(shared)
        for arm in (a, b):
            v = 1 / arm.se**2
            score = v * (arm.mean - shared)
            log_m += score**2 / (2 * (v + rho)) - 0.5 * np.log((v + rho) / rho)
        known = known_best({"a": a, "b": b}, delta=delta, smallest=0.05, increase=True)
        assert (known == "a") == (log_m.min() >= np.log(1 / delta))
