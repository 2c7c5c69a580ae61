"""Figures of a pool: accuracies with intervals, paired differences, energy of a training."""

import numpy as np
import pytest

from models.downscale.figures import Comparison, training_footprint

_DOMAINS = ["a"] * 300 + ["b"] * 100


def test_accuracy_is_a_mean_over_domains() -> None:
    """A domain with fewer questions counts as much as one with many."""
    comparison = Comparison(_DOMAINS, seed=0)
    right = np.array([1.0] * 300 + [0.0] * 100)
    assert comparison.mean(right) == {"value": 0.5, "interval_95": [0.5, 0.5]}


def test_intervals_cover_and_pairing_narrows_them() -> None:
    """The interval is that of a stratified mean; a difference of near twins has a narrow one."""
    comparison = Comparison(_DOMAINS, seed=0)
    rng = np.random.default_rng(1)
    one = np.concatenate([rng.random(300) < 0.7, rng.random(100) < 0.5]).astype(float)
    low, high = comparison.mean(one)["interval_95"]
    spread = np.sqrt(0.25 * (0.7 * 0.3 / 300 + 0.25 / 100))
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.12)
    twin = one.copy()
    twin[:3] = 1 - twin[:3]
    low, high = comparison.mean(one - twin)["interval_95"]
    assert high - low < 0.02


def test_the_footprint_of_training_says_how_it_was_got() -> None:
    """On a CPU, one hour at the table's 3.97 W; on a GPU, from the FLOPs."""
    cpu = training_footprint(cpu_s=3600, flops=1e15, device="cpu")
    assert cpu["wh"] == pytest.approx(3.97)
    assert cpu["operational_gco2e"] == pytest.approx(3.97 * 0.4806, rel=1e-3)
    assert "measured" in cpu["method"]
    gpu = training_footprint(cpu_s=1, flops=1e18, device="cuda")
    assert "modelled from FLOPs" in gpu["method"]
    assert np.isfinite(gpu["wh"])
