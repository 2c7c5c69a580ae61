"""Effects between arms with honest standard errors: clustered units, ratio metrics, CUPED.

Everything is computed from sums per randomised unit, because requests of one user are not
independent. A metric is a ratio of sums, R = Σ y_u / Σ d_u (d counts the requests that have a
value). By the delta method (Deng, Knoblich & Lu 2018) its sampling error is that of the mean of
the linearised unit values e_u = (y_u - R d_u) / mean(d).

CUPED (Deng, Xu, Kohavi & Walker 2013) subtracts what a covariate known before the answer
explains: with several covariates, θ = Σ_xx⁻¹ Σ_xy, in one dimension cov(X, Y)/var(X), pooled over
the arms so that adjusting moves no arm's expectation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class UnitSums:
    """One arm's sums per unit: `values` and `counts` [units], `covariates` [units, covariates]."""

    values: Floats
    counts: Floats
    covariates: Floats

    @property
    def num_units(self) -> int:
        """Units with at least one counted request."""
        return int(np.count_nonzero(self.counts))


@dataclass(frozen=True, kw_only=True)
class ArmMean:
    """An arm's mean per request and its standard error; NaN where nothing was counted."""

    mean: float
    se: float
    num_units: int


@dataclass(frozen=True, kw_only=True)
class Effect:
    """Treatment minus control. `variance_kept` is the share of variance CUPED left (1: none)."""

    estimate: float
    se: float
    control: ArmMean
    treatment: ArmMean
    variance_kept: float = 1.0


def arm_mean(sums: UnitSums) -> ArmMean:
    """Return the ratio mean of one arm."""
    mean, residuals = _linearise(sums.values, sums.counts)
    return ArmMean(mean=mean, se=_standard_error(residuals), num_units=sums.num_units)


def effect(treatment: UnitSums, control: UnitSums) -> Effect:
    """Return the difference of the two arms' ratio means, adjusted by their covariates."""
    arms = (treatment, control)
    means = [arm_mean(arm) for arm in arms]
    raw = [_linearise(arm.values, arm.counts)[1] for arm in arms]
    estimate = means[0].mean - means[1].mean
    raw_variance = sum(_standard_error(residuals) ** 2 for residuals in raw)
    theta, shifts, adjusted = _cuped(arms, raw)
    variance = sum(_standard_error(residuals) ** 2 for residuals in adjusted)
    return Effect(
        estimate=float(estimate - theta @ (shifts[0] - shifts[1])),
        se=float(np.sqrt(variance)),
        treatment=means[0],
        control=means[1],
        variance_kept=float(variance / raw_variance) if raw_variance > 0 else 1.0,
    )


def _linearise(values: Floats, counts: Floats) -> tuple[float, Floats]:
    """Return R = Σ values / Σ counts and each counting unit's error in it."""
    counting = counts > 0
    values, counts = values[counting], counts[counting]
    if not len(counts):
        return float("nan"), np.zeros(0)
    mean = float(values.sum() / counts.sum())
    return mean, (values - mean * counts) / counts.mean()


def _standard_error(residuals: Floats) -> float:
    n = len(residuals)
    return float(np.sqrt(np.square(residuals).sum() / (n * (n - 1)))) if n > 1 else float("nan")


def _cuped(
    arms: Sequence[UnitSums], raw: Sequence[Floats]
) -> tuple[Floats, list[Floats], list[Floats]]:
    """Return θ, each arm's covariate means, and each arm's adjusted residuals."""
    num = arms[0].covariates.shape[1]
    shifts, spread = [], []
    for arm in arms:
        columns = [_linearise(arm.covariates[:, k], arm.counts) for k in range(num)]
        shifts.append(np.array([mean for mean, _ in columns]))
        spread.append(np.column_stack([res for _, res in columns]) if num else None)
    if not num or any(len(residuals) < 2 for residuals in raw):
        return np.zeros(num), [np.zeros(num)] * 2, list(raw)
    x_UC = np.concatenate([x for x in spread if x is not None])
    # Least squares of minimal norm: a covariate without spread, or twice the same, gets no say.
    theta: Floats = np.linalg.lstsq(x_UC, np.concatenate(raw), rcond=1e-10)[0]
    adjusted = [
        residuals - x @ theta for residuals, x in zip(raw, spread, strict=True) if x is not None
    ]
    return theta, shifts, adjusted
