"""Thompson sampling: give each arm the probability that it is the best one (Thompson 1933).

It earns more while it learns, and pays for it: weights that follow the data bias plain means, and
the confidence sequence's coverage and the sample-ratio test no longer hold as proven. Use it to
choose among many arms; then confirm the winner with fixed weights. Propensities are logged, so
inverse-propensity estimates (`policies.experiments.offpolicy`) stay unbiased.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from policies.experiments.config import Experiment
from policies.experiments.effects import ArmMean

_DRAWS = 4096
_PRIOR_UNITS = 30


def thompson_weights(
    experiment: Experiment, means: Mapping[str, ArmMean], *, rng: np.random.Generator
) -> dict[str, float]:
    """Return each arm's new weight: P(best) under normal posteriors, at least the floor.

    `means` are the arms' means of the primary metric. Until every arm has 30 units, the
    configured weights stay.
    """
    names = [arm.name for arm in experiment.arms]
    if any(
        name not in means or means[name].num_units < _PRIOR_UNITS or not means[name].se > 0
        for name in names
    ):
        return {arm.name: arm.weight for arm in experiment.arms}
    centre = np.array([means[name].mean for name in names])
    spread = np.array([means[name].se for name in names])
    draws = rng.normal(centre, spread, size=(_DRAWS, len(names)))
    best = draws.argmax(1) if experiment.direction == "increase" else draws.argmin(1)
    share = np.bincount(best, minlength=len(names)) / _DRAWS
    floor = experiment.allocation.floor
    weights = floor + (1 - floor * len(names)) * share
    return dict(zip(names, (weights / weights.sum()).tolist(), strict=True))
