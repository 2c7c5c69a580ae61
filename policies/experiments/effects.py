"""Effects between arms with honest standard errors: clustered units, ratio metrics, CUPED.

Everything is computed from sums per randomised unit, because requests of one user are not
independent. A metric is a ratio of sums, R = Σ y_u / Σ d_u (d counts the requests that have a
value). By the delta method (Deng, Knoblich & Lu 2018) its sampling error is that of the sum of
the units' shares in it, e_u = (y_u - R d_u) / Σ d.

CUPED (Deng, Xu, Kohavi & Walker 2013) subtracts what a covariate known before the answer
explains: with several covariates, θ = Σ_xx⁻¹ Σ_xy, in one dimension cov(X, Y)/var(X), pooled over
the arms so that adjusting moves no arm's expectation.

A judge's grades shrink the error of what people say in the same way (prediction-powered inference:
Angelopoulos, Bates, Fannjiang, Jordan & Zrnic 2023; with θ as in PPI++, Angelopoulos, Duchi &
Zrnic 2023). The mean grade of the rated answers less that of all graded ones has expectation zero
in every arm, however wrong the judge is and whichever arm it likes, as long as it is not the answer
that makes people rate. So it is one column more for CUPED.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """One request: who (`unit`), where (`arm`, with its `propensity`), when, and what came of it.

    `values` holds metrics and covariates by name; what is not known is left out or None. `parts`
    say, by the segment's name, which part of it the request belongs to.
    """

    unit: str
    arm: str
    propensity: float
    time_s: float
    values: Mapping[str, float | None]
    parts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Observations:
    """Columns over N requests in order of time, each unit in the first arm it was seen in.

    `arm` indexes `arms`, `unit` numbers the `units` in order of first appearance, `columns` hold
    NaN where a value is not known, `parts` the part of each segment. `num_crossed` counts the rows
    left out because their unit had moved to another arm (changed weights): its first arm was
    random, its moving was not.
    """

    arms: tuple[str, ...]
    arm: Ints
    unit: Ints
    propensity: Floats
    time_s: Floats
    columns: Mapping[str, Floats]
    parts: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)
    units: tuple[str, ...] = ()
    num_crossed: int = 0

    @classmethod
    def from_rows(cls, rows: Iterable[Observation], *, arms: Sequence[str]) -> Observations:
        """Arrange `rows`, in any order; rows of arms not in `arms` are left out."""
        number = {name: i for i, name in enumerate(arms)}
        ordered = sorted((row for row in rows if row.arm in number), key=lambda row: row.time_s)
        units: dict[str, int] = {}
        first_arm: list[int] = []
        kept: list[Observation] = []
        kept_units: list[int] = []
        for row in ordered:
            unit = units.setdefault(row.unit, len(units))
            if unit == len(first_arm):
                first_arm.append(number[row.arm])
            if first_arm[unit] == number[row.arm]:
                kept.append(row)
                kept_units.append(unit)
        names = sorted({name for row in kept for name in row.values})
        segments = sorted({name for row in kept for name in row.parts})
        return cls(
            arms=tuple(arms),
            arm=np.array([number[row.arm] for row in kept], dtype=np.int64),
            unit=np.array(kept_units, dtype=np.int64),
            propensity=np.array([row.propensity for row in kept], dtype=np.float64),
            time_s=np.array([row.time_s for row in kept], dtype=np.float64),
            columns={
                # None becomes NaN.
                name: np.array([row.values.get(name) for row in kept], dtype=np.float64)
                for name in names
            },
            parts={name: np.array([row.parts.get(name, "") for row in kept]) for name in segments},
            units=tuple(units),
            num_crossed=len(ordered) - len(kept),
        )

    def __len__(self) -> int:
        return len(self.arm)

    @property
    def num_units(self) -> int:
        """Distinct units."""
        return int(self.unit.max()) + 1 if len(self) else 0

    def first(self, num_requests: int) -> Observations:
        """Return what was known after the first `num_requests` requests."""
        return self._where(np.arange(len(self)) < num_requests)

    def before(self, time_s: float) -> Observations:
        """Return the requests that arrived before `time_s`."""
        return self._where(self.time_s < time_s)

    def within(self, segment: str, part: str) -> Observations:
        """Return the requests of one part of a segment; `num_units` is not theirs."""
        return self._where(self.parts[segment] == part)

    def _where(self, kept: NDArray[np.bool_]) -> Observations:
        return replace(
            self,
            arm=self.arm[kept],
            unit=self.unit[kept],
            propensity=self.propensity[kept],
            time_s=self.time_s[kept],
            columns={name: column[kept] for name, column in self.columns.items()},
            parts={name: part[kept] for name, part in self.parts.items()},
        )

    def first_seen(self) -> tuple[Ints, Floats]:
        """Return the arm and the time of first appearance of every unit."""
        index = self.first_indices()
        return self.arm[index], self.time_s[index]

    def first_indices(self) -> Ints:
        """Return the place of every unit's first request."""
        return np.unique(self.unit, return_index=True)[1].astype(np.int64)

    def sums(
        self,
        arm: str,
        metric: str,
        covariates: Sequence[str] = (),
        *,
        per: str | None = None,
        judge: str | None = None,
    ) -> UnitSums:
        """Return `metric` summed per unit of `arm`, weighted by one over the propensity.

        Counts are requests that have a value, or sums of the metric `per`; `judge` is the column of
        a judge's grades. The weights are all one while the arm's weight never changed; if it did,
        they undo that the arm then saw more of one period's traffic than of another's.
        """
        here = self.arm == self.arms.index(arm)
        unknown = np.full(len(self), np.nan)
        value = self.columns.get(metric, unknown)[here]
        count = np.ones(len(value)) if per is None else self.columns.get(per, unknown)[here]
        grade = unknown[here] if judge is None else self.columns.get(judge, unknown)[here]
        known, graded = ~np.isnan(value) & ~np.isnan(count), ~np.isnan(grade)
        both, counted = known & graded, known | graded
        unit, propensity = self.unit[here][counted], self.propensity[here][counted]
        weight = propensity.max() / propensity if len(propensity) else propensity
        _, code = np.unique(unit, return_inverse=True)

        def total(column: Floats, where: NDArray[np.bool_]) -> Floats:
            kept = np.where(where, column, 0.0)[counted]
            return np.bincount(code, weights=weight * kept).astype(np.float64)

        def columns(parts: Sequence[Floats]) -> Floats:
            return np.column_stack(parts) if parts else np.zeros((int(code.max(initial=-1)) + 1, 0))

        one = np.ones(len(value))
        judged = [total(*of) for of in ((grade, both), (one, both), (grade, graded), (one, graded))]
        return UnitSums(
            values=total(value, known),
            counts=total(count, known),
            # A request that lacks a covariate gets the others' mean: it then explains nothing.
            covariates=columns([total(self._covariate(c)[here], known) for c in covariates]),
            grades=columns(judged if judge is not None else []),
        )

    def _covariate(self, name: str) -> Floats:
        column = self.columns.get(name, np.full(len(self), np.nan))
        return _filled(column)


def _filled(column: Floats) -> Floats:
    known = column[~np.isnan(column)]
    return np.where(np.isnan(column), known.mean() if len(known) else 0.0, column)


Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class UnitSums:
    """One arm's sums per unit: `values` and `counts` [units], `covariates` [units, covariates].

    `grades` [units, 4] are a judge's of answers that also have a value, their number, then those of
    all graded answers and their number; None or [units, 0] without a judge.
    """

    values: Floats
    counts: Floats
    covariates: Floats
    grades: Floats | None = None

    @property
    def num_units(self) -> int:
        """Units with at least one counted request."""
        return int(np.count_nonzero(self.counts))

    @property
    def num_graded(self) -> int:
        """Units with an answer that has both a value and a judge's grade."""
        return 0 if self.grades is None else int(np.count_nonzero(self.grades[:, 1:2]))

    def adjusters(self) -> list[tuple[float, Floats]]:
        """Return what explains the metric's error, each with its mean and the units' errors in it.

        A judge's, which comes last, is the mean grade of what also has a value less that of all.
        """
        found = [_linearise(column, self.counts) for column in self.covariates.T]
        if self.grades is not None and self.grades.size:
            (rated, rated_U), (every, every_U) = (
                _linearise(self.grades[:, at], self.grades[:, at + 1]) for at in (0, 2)
            )
            enough = self.num_graded >= FEWEST_GRADED
            found.append((rated - every, rated_U - every_U) if enough else (0.0, 0.0 * every_U))
        return found


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


# With fewer units whose answers are both rated and graded, a judge counts for nothing.
FEWEST_GRADED = 30


def arm_mean(sums: UnitSums) -> ArmMean:
    """Return the ratio mean of one arm, with the help of a judge's grades where there are any."""
    mean, residuals = _linearise(sums.values, sums.counts)
    if sums.num_graded:
        judge, judge_U = sums.adjusters()[-1]
        theta = float(residuals @ judge_U) / max(float(judge_U @ judge_U), 1e-300)
        mean, residuals = mean - theta * judge, residuals - theta * judge_U
    se = _standard_error(residuals, sums.num_units)
    return ArmMean(mean=mean, se=se, num_units=sums.num_units)


def rating_shift(sums: UnitSums) -> float:
    """Return by how many standard errors a judge grades rated answers higher than all of them.

    Far from zero, it is the answer that makes people rate, and neither their mean nor the judge's
    correction of it tells of the answers that nobody rated. Zero where little is known.
    """
    if sums.num_graded < FEWEST_GRADED:
        return 0.0
    shift, residuals = sums.adjusters()[-1]
    se = _standard_error(residuals, sums.num_graded)
    return shift / se if se > 0 else 0.0


def effect(treatment: UnitSums, control: UnitSums) -> Effect:
    """Return the difference of the two arms' ratio means, adjusted by covariates and grades."""
    arms = (treatment, control)
    raw = [_linearise(arm.values, arm.counts) for arm in arms]
    theta, shifts, adjusted = _cuped(arms, [residuals for _, residuals in raw])
    raw_variance, variance = (
        sum(_standard_error(e_U, arm.num_units) ** 2 for e_U, arm in zip(each, arms, strict=True))
        for each in ([residuals for _, residuals in raw], adjusted)
    )
    return Effect(
        estimate=float(raw[0][0] - raw[1][0] - theta @ (shifts[0] - shifts[1])),
        se=float(np.sqrt(variance)),
        treatment=arm_mean(treatment),
        control=arm_mean(control),
        variance_kept=float(variance / raw_variance) if raw_variance > 0 else 1.0,
    )


def _linearise(values: Floats, counts: Floats) -> tuple[float, Floats]:
    """Return R = Σ values / Σ counts and each unit's share in its error."""
    total = counts.sum()
    if not total:
        return float("nan"), np.zeros(len(counts))
    mean = float(values.sum() / total)
    return mean, (values - mean * counts) / total


def _standard_error(residuals: Floats, num_units: int) -> float:
    """Return the standard error of a mean that `num_units` count in, by their shares in it."""
    if num_units < 2:
        return float("nan")
    return float(np.sqrt(np.square(residuals).sum() * num_units / (num_units - 1)))


def _cuped(
    arms: Sequence[UnitSums], raw: Sequence[Floats]
) -> tuple[Floats, list[Floats], list[Floats]]:
    """Return θ, each arm's means of what adjusts it, and each arm's adjusted residuals."""
    adjusters = [arm.adjusters() for arm in arms]
    num = len(adjusters[0])
    if not num or any(arm.num_units < 2 for arm in arms):
        return np.zeros(num), [np.zeros(num)] * 2, list(raw)
    shifts = [np.array([mean for mean, _ in columns]) for columns in adjusters]
    spread = [np.column_stack([column for _, column in columns]) for columns in adjusters]
    # Least squares of minimal norm: a covariate without spread, or twice the same, gets no say.
    theta: Floats = np.linalg.lstsq(np.concatenate(spread), np.concatenate(raw), rcond=1e-10)[0]
    adjusted = [residuals - x_U @ theta for residuals, x_U in zip(raw, spread, strict=True)]
    return theta, shifts, adjusted
