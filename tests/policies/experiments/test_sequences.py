"""The confidence sequence keeps its promises while somebody looks after every single unit."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm

from policies.experiments import sequences

ALPHA = 0.05
MIN_PER_ARM = 30


def simulate(
    rates: tuple[float, float], *, num_units: int, num_runs: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Estimates and standard errors [runs, looks] of two arms that grow unit by unit."""
    rng = np.random.default_rng(seed)
    n = np.arange(1, num_units // 2 + 1)
    means, variances = [], []
    for rate in rates:
        mean = (rng.random((num_runs, num_units // 2)) < rate).cumsum(1) / n
        means.append(mean)
        variances.append(mean * (1 - mean) / np.maximum(n - 1, 1))
    looks = slice(MIN_PER_ARM - 1, None)
    estimate, se = means[1] - means[0], np.sqrt(variances[0] + variances[1])
    return estimate[:, looks], se[:, looks]


def test_check_values() -> None:
    """v = v* = 1000 at α = 0.05 gives ρ = 126.006 and the bound 95.982."""
    rho = sequences.tuned_rho(1000.0, alpha=ALPHA)
    assert rho == pytest.approx(126.006, abs=5e-4)
    assert sequences.boundary(1000.0, rho=rho, alpha=ALPHA) == pytest.approx(95.982, abs=5e-4)


@pytest.mark.parametrize("z", np.linspace(0, 6, 25))
def test_p_falls_below_alpha_exactly_when_the_interval_leaves_zero(z: float) -> None:
    """Intervals and p-values never disagree, at any information."""
    for se in (0.3, 0.03, 0.003):
        rho = sequences.rho_for(0.05, alpha=ALPHA)
        excluded = z * se > sequences.radius(se, rho=rho, alpha=ALPHA)
        assert excluded == (sequences.p_value(z * se, se, rho=rho) < ALPHA)


def test_no_spread_is_no_evidence() -> None:
    """Thirty equal values have standard error zero; they prove nothing."""
    rho = sequences.rho_for(0.05, alpha=ALPHA)
    assert sequences.radius(0.0, rho=rho, alpha=ALPHA) == np.inf
    assert sequences.p_value(0.2, 0.0, rho=rho) == 1.0
    assert sequences.p_value(0.2, float("nan"), rho=rho) == 1.0


def test_peeking_after_every_unit_keeps_false_positives_below_alpha() -> None:
    """A/A, 5,000 units, a look after each: at most 5% false positives; a t-test has over 30%.

    Seed 1, 2,000 runs. The sequence's true rate here is about 2.5% (Monte Carlo), so this fails
    by chance with probability P(Bin(2000, 0.025) > 100) < 1e-10.
    """
    estimate, se = simulate((0.5, 0.5), num_units=5000, num_runs=2000, seed=1)
    rho = sequences.rho_for(0.05, alpha=ALPHA)
    sequential = np.abs(estimate) > sequences.radius(se, rho=rho, alpha=ALPHA)
    fixed = np.abs(estimate) > norm.isf(ALPHA / 2) * se
    assert sequential.any(1).mean() <= ALPHA
    assert fixed.any(1).mean() > 0.3
    # Used as meant, at one fixed horizon, the t-test is fine: the fault is the peeking.
    assert fixed[:, -1].mean() < 0.07


@pytest.mark.parametrize("rate", [0.02, 0.1])
def test_rare_events_keep_the_promise_too(rate: float) -> None:
    """Error rates of 2% and 10%: at most 5% false positives while peeking (seed 2, 1,000 runs).

    True rates are at most about 2.5%, so P(Bin(1000, 0.025) > 50) < 1e-5 per case.
    """
    estimate, se = simulate((rate, rate), num_units=5000, num_runs=1000, seed=2)
    rho = sequences.rho_for(0.02, alpha=ALPHA)
    crossed = np.abs(estimate) > sequences.radius(se, rho=rho, alpha=ALPHA)
    assert crossed.any(1).mean() <= ALPHA


def test_the_truth_stays_inside_at_all_times() -> None:
    """At least 95% of the sequences hold a true 5-point lift at every one of 5,000 looks.

    Seed 3, 2,000 runs; true miss rate about 2.5%, chance of failing below 1e-10.
    """
    estimate, se = simulate((0.5, 0.55), num_units=5000, num_runs=2000, seed=3)
    rho = sequences.rho_for(0.05, alpha=ALPHA)
    outside = np.abs(estimate - 0.05) > sequences.radius(se, rho=rho, alpha=ALPHA)
    assert 1 - outside.any(1).mean() >= 1 - ALPHA


def test_a_true_lift_is_found_within_twice_the_fixed_sample() -> None:
    """A 5-point lift is found with 90% power within twice what a fixed test with that power needs.

    Seed 4, 1,000 runs. True power is about 0.96, so P(Bin(1000, 0.96) < 900) < 1e-15. On average
    the sequence stops well before the limit.
    """
    spread = 0.5 * 0.5 + 0.55 * 0.45
    fixed = 2 * spread * sequences.information_for(0.05, alpha=ALPHA, power=0.9)
    estimate, se = simulate((0.5, 0.55), num_units=2 * int(fixed), num_runs=1000, seed=4)
    rho = sequences.rho_for(0.05, alpha=ALPHA)
    found = estimate > sequences.radius(se, rho=rho, alpha=ALPHA)
    assert found.any(1).mean() >= 0.9
    stops = 2 * (found.argmax(1) + MIN_PER_ARM)[found.any(1)]
    assert stops.mean() < fixed


def test_information_is_the_textbook_sample_size() -> None:
    """90% power for a 5-point lift at rates 0.5 and 0.55 needs about 2,091 units per arm."""
    information = sequences.information_for(0.05, alpha=ALPHA, power=0.9)
    assert (0.5 * 0.5 + 0.55 * 0.45) * information == pytest.approx(2091, abs=1)


def test_power_at_a_look_matches_its_frequency() -> None:
    """The stated power at one look is the share of intervals there that exclude zero (seed 5).

    4,000 draws: four standard deviations are 0.032.
    """
    rho, se = sequences.rho_for(0.05, alpha=ALPHA), 0.014
    draws = np.random.default_rng(5).normal(0.05, se, 4000)
    share = (draws > sequences.radius(se, rho=rho, alpha=ALPHA)).mean()
    assert share == pytest.approx(sequences.power_at(0.05, se, rho=rho, alpha=ALPHA), abs=0.032)
