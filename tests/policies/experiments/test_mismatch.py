"""The sample-ratio alarm: loud for a broken split, quiet for a sound one."""

from __future__ import annotations

import numpy as np

from policies.experiments.report import sample_ratio


def test_one_percent_misassigned_of_100_000_units_is_caught() -> None:
    """1,000 of 100,000 units in the wrong arm raise the alarm (49,000 against 51,000)."""
    assert sample_ratio(("a", "b"), (49_000, 51_000), (0.5, 0.5)).alarm


def test_one_percent_misassigned_is_caught_despite_noise() -> None:
    """Drawn at random with 1% misassigned, over 98% of 1,000 splits raise the alarm (seed 1).

    The statistic is noncentral χ² with 40, so an alarm has probability 0.9988.
    """
    counts = np.random.default_rng(1).binomial(100_000, 0.49, 1000)
    alarms = [sample_ratio(("a", "b"), (n, 100_000 - n), (0.5, 0.5)).alarm for n in counts]
    assert np.mean(alarms) > 0.98


def test_a_sound_split_is_quiet() -> None:
    """At most 4 in 1,000 sound splits raise it (seed 2; P(Bin(2000, 0.001) > 8) < 3e-4)."""
    counts = np.random.default_rng(2).multinomial(50_000, (0.2, 0.3, 0.5), 2000)
    alarms = [sample_ratio(("a", "b", "c"), c.tolist(), (0.2, 0.3, 0.5)).alarm for c in counts]
    assert sum(alarms) <= 8


def test_arms_without_weight_are_left_out() -> None:
    """A stopped arm neither counts nor divides by zero; no units, no alarm."""
    assert sample_ratio(("a", "b", "c"), (50, 50, 3), (0.5, 0.5, 0.0)).p == 1.0
    assert not sample_ratio(("a", "b"), (0, 0), (0.5, 0.5)).alarm
