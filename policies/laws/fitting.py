"""Fitting a law's constants to measurements, with bootstrap intervals.

Non-linear least squares (SciPy) from several starting points. Constants that must be positive are
fitted as logarithms, so that ones of very different size (Chinchilla's A and E) are equally well
conditioned. Intervals come from the residual bootstrap: with the few design points that scaling
studies have, resampling points themselves would leave constants undetermined.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from policies.errors import LawError

Array: TypeAlias = NDArray[np.float64]
Law = TypeVar("Law")
# A scalar or an array of one value per measurement; laws predict elementwise.
Number = TypeVar("Number", float, Array)

_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A bootstrap percentile interval, of 95%."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Fitted(Generic[Law]):
    """A law fitted to measurements.

    `intervals` holds each constant's by name, from `num_resamples` residual bootstrap resamples;
    `rmse` is in the units of what the law predicts.
    """

    law: Law
    intervals: dict[str, Interval]
    rmse: float
    num_points: int
    num_resamples: int


@dataclass(frozen=True, kw_only=True)
class Constant:
    """One constant to fit: its name, where to start from, and whether it is positive."""

    name: str
    starts: tuple[float, ...]
    positive: bool = True


def fit_law(
    build: Callable[..., Law],
    *,
    at: Mapping[str, Sequence[float]],
    losses: Sequence[float],
    constants: Sequence[Constant],
    scale: Literal["linear", "log"] = "linear",
    seed: int = 0,
    num_resamples: int = 200,
) -> Fitted[Law]:
    """Return the law of the type `build` that comes closest to `losses`, measured at `at`.

    `at` maps each argument of the law's `predict` to its values, one per measurement. `scale` "log"
    minimises relative errors (losses that span a range). The start of constant i in the j-th
    attempt is `starts[j % len(starts)]`; the intervals are the bootstrap's. Raises `LawError` where
    lengths differ, with fewer points than constants plus one, or values that are not finite.
    """
    points = {name: as_array(values, name, len(losses)) for name, values in at.items()}
    measured = as_array(losses, "losses", len(losses))
    if not np.isfinite(measured).all() or (scale == "log" and (measured <= 0).any()):
        raise LawError(f"measured values must be finite{' and > 0' if scale == 'log' else ''}")
    if len(measured) <= len(constants):
        raise LawError(
            f"{len(measured)} measurements cannot fit {len(constants)} constants with an interval; "
            f"at least {len(constants) + 1} are needed"
        )

    def predict(law: Law) -> Array:
        predicted: Array = getattr(law, "predict")(**points)  # noqa: B009 - a Law is any type
        return predicted

    from scipy.optimize import least_squares  # noqa: PLC0415 - heavy, and a server waits

    is_log = np.array([constant.positive for constant in constants])

    def law_at(theta: Array) -> Law:
        # Clipped so that a wild step of the optimiser cannot overflow exp.
        values = np.where(is_log, np.exp(np.clip(theta, -60, 60)), theta)
        named = zip(constants, values, strict=True)
        return build(**{constant.name: float(value) for constant, value in named})

    def transform(values: Array) -> Array:
        return np.log(np.maximum(values, 1e-300)) if scale == "log" else values

    def solve(target: Array, start: Array) -> tuple[float, Array]:
        def residuals(theta: Array) -> Array:
            with np.errstate(all="ignore"):
                difference = transform(predict(law_at(theta))) - target
            return np.nan_to_num(difference, nan=1e6, posinf=1e6, neginf=-1e6)

        solution: Any = least_squares(residuals, start, max_nfev=2000, x_scale=1.0)
        return float(solution.cost), np.asarray(solution.x, dtype=np.float64)

    attempts = max(len(constant.starts) for constant in constants)
    starts = [
        np.array(
            [
                np.log(c.starts[j % len(c.starts)]) if c.positive else c.starts[j % len(c.starts)]
                for c in constants
            ]
        )
        for j in range(attempts)
    ]
    target = transform(measured)
    _, theta = min((solve(target, start) for start in starts), key=lambda found: found[0])
    law = law_at(theta)
    fitted = transform(predict(law))

    residuals = target - fitted
    # Residuals of a fit with p constants are too small by sqrt((n - p) / n).
    residuals = (residuals - residuals.mean()) * np.sqrt(
        len(measured) / (len(measured) - len(constants))
    )
    rng = np.random.default_rng(seed)
    samples = np.array(
        [
            solve(fitted + rng.choice(residuals, size=len(residuals)), theta)[1]
            for _ in range(num_resamples)
        ]
    ).reshape(num_resamples, len(constants))
    samples = np.where(is_log, np.exp(np.clip(samples, -60, 60)), samples)
    tail = (1 - _CONFIDENCE) / 2
    intervals = {}
    for column, constant in enumerate(constants):
        low, high = np.quantile(samples[:, column], [tail, 1 - tail]) if num_resamples else (0, 0)
        if num_resamples:
            intervals[constant.name] = Interval(low=float(low), high=float(high))
    return Fitted(
        law=law,
        intervals=intervals,
        rmse=float(np.sqrt(np.mean((predict(law) - measured) ** 2))),
        num_points=len(measured),
        num_resamples=num_resamples,
    )


def power(base: Number, exponent: float) -> Number:
    """Return base^exponent with the type of `base` (Python types a float's power as Any)."""
    result: Number = base**exponent
    return result


def as_array(values: Sequence[float] | Array, name: str, num_points: int) -> Array:
    """Return `values` as floats; `LawError` unless there are `num_points` of them."""
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (num_points,):
        raise LawError(f"{name} has shape {array.shape}; one value per measurement is {num_points}")
    return array
