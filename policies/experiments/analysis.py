"""From observations to a report: intervals, alarms, guardrails and a recommendation.

Families of comparisons, each with the experiment's alpha: primary (one per treatment), guardrails
(treatments × guardrails), secondary (treatments × secondary metrics) and segments (treatments ×
parts of the traffic). The first two are corrected by Bonferroni, so that all their intervals hold
together; the others as the experiment says, and never decide.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from policies.experiments import sequences
from policies.experiments.effects import Observations, UnitSums, arm_mean, effect, rating_shift
from policies.experiments.experiment import HOLDOUT, Arm, Experiment
from policies.experiments.metrics import METRICS, Goal, Guardrail
from policies.experiments.report import (
    ArmReport,
    Comparison,
    GuardrailReport,
    Point,
    Report,
    SampleRatio,
    advise,
    sample_ratio,
)
from policies.experiments.sequences import known_best

# Below this many units in either arm, normal approximations do not hold and nothing is concluded.
MIN_UNITS = 30
# Metrics without a configured minimum effect are tuned to show two points of a share, or 5%.
_SHARE_EFFECT, _RELATIVE_EFFECT = 0.02, 0.05
_MOST_PARTS = 8
# Standard errors by which a judge may grade rated answers otherwise than all, at any of many looks.
_CHOSEN = 4.0


@dataclass(frozen=True, kw_only=True)
class WeightsSince:
    """The weights in force from `time_s` on."""

    time_s: float
    weights: Mapping[str, float]


def analyse(
    experiment: Experiment,
    observations: Observations,
    *,
    allocations: Sequence[WeightsSince] = (),
    stopped_s: Mapping[str, float] | None = None,
) -> Report:
    """Return the report on `experiment` after `observations`.

    `allocations` is the history of weights in order of time (empty: the configured ones all
    along). `stopped_s` says when a guardrail stopped an arm: it is compared with what the control
    saw until then.
    """
    stopped_s = stopped_s or {}
    ratio = _sample_ratio(experiment, observations, _periods(experiment, allocations, stopped_s))
    goal, treatments = experiment.primary, experiment.treatments
    seen_by = {arm: _until(observations, arm, stopped_s) for arm in treatments}
    primary = tuple(
        _compare(experiment, seen_by[arm], arm, goal, len(treatments)) for arm in treatments
    )
    secondary = _corrected(
        experiment,
        [
            (seen_by[arm], arm, _default_goal(experiment, metric), None, None)
            for metric in experiment.secondary
            for arm in treatments
        ],
    )
    segments = _corrected(
        experiment,
        [
            (seen_by[arm].within(segment, part), arm, goal, segment, part)
            for segment in experiment.segments
            for part in _parts(observations, segment)
            for arm in treatments
        ],
    )
    guardrails = check_guardrails(experiment, observations, stopped_s=stopped_s)
    arms = tuple(
        _arm_report(experiment, observations, arm, stopped=arm.name in stopped_s)
        for arm in _with_holdout(experiment)
    )
    metric = goal.metric
    best = None
    if experiment.allocation.kind == "best_arm":
        racing = {
            arm.name: arm.means[metric]
            for arm in arms
            if metric in arm.means and arm.name not in {HOLDOUT, *stopped_s}
        }
        if all(mean.num_units >= MIN_UNITS for mean in racing.values()):
            best = known_best(
                racing,
                delta=experiment.alpha,
                smallest=goal.smallest(racing[experiment.control_arm.name].mean),
                increase=experiment.direction == "increase",
            )
    advice = advise(
        experiment,
        known_best=best,
        arms=arms,
        primary=primary,
        guardrails=guardrails,
        ratio=ratio,
        min_units=MIN_UNITS,
        stopped=tuple(stopped_s),
    )
    return Report(
        name=experiment.name,
        unit=experiment.unit,
        primary_metric=goal.metric,
        direction=experiment.direction,
        alpha=experiment.alpha,
        num_units=observations.num_units,
        num_requests=len(observations),
        num_crossed=observations.num_crossed,
        arms=arms,
        primary=primary,
        secondary=secondary,
        segments=segments,
        guardrails=guardrails,
        sample_ratio=ratio,
        **vars(replace(advice, notes=(*advice.notes, *_selective(experiment, observations)))),
    )


def check_guardrails(
    experiment: Experiment,
    observations: Observations,
    *,
    stopped_s: Mapping[str, float] | None = None,
) -> tuple[GuardrailReport, ...]:
    """Return every guardrail of every treatment; cheap enough to call again and again."""
    family = len(experiment.treatments) * len(experiment.guardrails)
    reports = []
    for guardrail in experiment.guardrails:
        for arm in experiment.treatments:
            seen = _until(observations, arm, stopped_s or {})
            goal = _guarded_goal(experiment, guardrail)
            found = _compare(experiment, seen, arm, goal, family)
            up = experiment.metric(guardrail.metric).direction == "decrease"
            scale = abs(found.control_mean) if guardrail.relative else 1.0
            harm_low = found.low if up else -found.high
            reports.append(
                GuardrailReport(
                    metric=guardrail.metric,
                    treatment=arm.name,
                    harm=found.estimate if up else -found.estimate,
                    harm_low=harm_low,
                    limit=guardrail.limit * scale,
                    breached=harm_low > guardrail.limit * scale,
                )
            )
    return tuple(reports)


def trajectory(
    experiment: Experiment, observations: Observations, treatment: Arm, *, num_points: int = 80
) -> tuple[Point, ...]:
    """Return how `treatment`'s primary interval narrowed, at up to `num_points` looks."""
    looks = np.unique(np.linspace(0, len(observations), num_points + 1, dtype=np.int64)[1:])
    family = len(experiment.treatments)
    points = []
    for look in looks[looks > 0]:
        found = _compare(
            experiment, observations.first(int(look)), treatment, experiment.primary, family
        )
        points.append(
            Point(
                time_s=float(observations.time_s[look - 1]),
                num_requests=int(look),
                estimate=found.estimate,
                low=found.low,
                high=found.high,
            )
        )
    return tuple(points)


_Asked: TypeAlias = tuple[Observations, Arm, Goal, str | None, str | None]


def _corrected(experiment: Experiment, asked: Sequence[_Asked]) -> tuple[Comparison, ...]:
    """Compare all that is `asked`, as one family corrected as the experiment says."""

    def compare(family: float) -> list[Comparison]:
        return [
            replace(_compare(experiment, seen, arm, goal, family), segment=segment, part=part)
            for seen, arm, goal, segment, part in asked
        ]

    if experiment.correction == "bonferroni" or not asked:
        return tuple(compare(len(asked)))
    from scipy.stats import false_discovery_control  # noqa: PLC0415 - heavy, and a server waits

    p = false_discovery_control([found.p for found in compare(1)], method="bh")
    num_found = max(1, int((p <= experiment.alpha).sum()))
    return tuple(
        replace(found, p=float(own), better=found.better if own <= experiment.alpha else None)
        for found, own in zip(compare(len(asked) / num_found), p, strict=True)
    )


def _selective(experiment: Experiment, seen: Observations) -> list[str]:
    """Return a note for each arm of which, by the judge's grades, people chose what to rate."""
    notes = []
    for arm in experiment.arms if experiment.judge else ():
        shift = rating_shift(_sums(experiment, seen, arm.name, "judged_quality", adjusted=False))
        if abs(shift) > _CHOSEN:
            notes.append(
                f"The judge grades the answers of {arm.name!r} that were rated "
                f"{'higher' if shift > 0 else 'lower'} than others ({abs(shift):.1f} standard "
                "errors): what people rate depends on the answer, so neither quality nor "
                "judged_quality tells of the answers that nobody rated."
            )
    return notes


def _parts(seen: Observations, segment: str) -> list[str]:
    """Return the largest parts of `segment`."""
    names, counts = np.unique(seen.parts.get(segment, np.zeros(0, str)), return_counts=True)
    largest = sorted(zip(counts.tolist(), names.tolist(), strict=True), reverse=True)
    return [name for _, name in largest[:_MOST_PARTS]]


def _sums(
    experiment: Experiment, seen: Observations, arm: str, metric: str, *, adjusted: bool
) -> UnitSums:
    """Return the metric's sums per unit of `arm`, with covariates where they are to adjust it."""
    covariates = experiment.covariates if adjusted else ()
    if metric == "judged_quality":
        return seen.sums(arm, "quality", covariates, judge="grade")
    own = experiment.metrics.get(metric)
    if own is None or own.ratio is None:
        return seen.sums(arm, metric, covariates)
    value, count = own.ratio
    return seen.sums(arm, value, covariates, per=count)


def _compare(
    experiment: Experiment, seen: Observations, arm: Arm, goal: Goal, family: float
) -> Comparison:
    """Compare `arm` with the control on the goal's metric, corrected for `family` comparisons."""
    treated, control = (
        _sums(experiment, seen, name, goal.metric, adjusted=True)
        for name in (arm.name, experiment.control_arm.name)
    )
    found = effect(treated, control)
    smallest = goal.smallest(found.control.mean)
    alpha = experiment.alpha / family
    enough = min(found.control.num_units, found.treatment.num_units) >= MIN_UNITS
    width, p, power = math.inf, 1.0, 0.0
    if enough and smallest > 0:
        rho = sequences.rho_for(smallest, alpha=alpha)
        width = float(sequences.radius(found.se, rho=rho, alpha=alpha))
        p = min(1.0, family * float(sequences.p_value(found.estimate, found.se, rho=rho)))
        power = sequences.power_at(smallest, found.se, rho=rho, alpha=alpha)
    low, high = found.estimate - width, found.estimate + width
    return Comparison(
        metric=goal.metric,
        treatment=arm.name,
        control=experiment.control_arm.name,
        estimate=found.estimate,
        se=found.se,
        low=low,
        high=high,
        p=p,
        control_mean=found.control.mean,
        relative=found.estimate / abs(found.control.mean) if found.control.mean else math.nan,
        better=_better(experiment, goal, low, high),
        variance_kept=found.variance_kept,
        power=power,
    )


def _default_goal(experiment: Experiment, metric: str) -> Goal:
    """Return what a metric without a configured minimum effect is tuned to show."""
    own = experiment.metrics.get(metric)
    if own is not None:
        return Goal(metric=metric, minimum_effect=own.minimum_effect, relative=own.relative)
    if METRICS[metric].is_share:
        return Goal(metric=metric, minimum_effect=_SHARE_EFFECT)
    return Goal(metric=metric, minimum_effect=_RELATIVE_EFFECT, relative=True)


def _guarded_goal(experiment: Experiment, guardrail: Guardrail) -> Goal:
    """Return the goal whose sequence is tight where harm of the limit's size would show."""
    if not guardrail.limit:
        return _default_goal(experiment, guardrail.metric)
    return Goal(
        metric=guardrail.metric, minimum_effect=guardrail.limit, relative=guardrail.relative
    )


def _better(experiment: Experiment, goal: Goal, low: float, high: float) -> bool | None:
    if not (low > 0 or high < 0):
        return None
    return (low > 0) == ((goal.direction or experiment.metric(goal.metric).direction) == "increase")


def _until(seen: Observations, arm: Arm, stopped_s: Mapping[str, float]) -> Observations:
    return seen.before(stopped_s[arm.name]) if arm.name in stopped_s else seen


def _with_holdout(experiment: Experiment) -> tuple[Arm, ...]:
    if not experiment.holdout:
        return experiment.arms
    held = Arm(name=HOLDOUT, policy=experiment.control_arm.policy, weight=experiment.holdout)
    return (*experiment.arms, held)


def arm_names(experiment: Experiment) -> tuple[str, ...]:
    """Return the names of all arms that observations may have, the holdout's included."""
    return tuple(arm.name for arm in _with_holdout(experiment))


def _arm_report(
    experiment: Experiment, seen: Observations, arm: Arm, *, stopped: bool
) -> ArmReport:
    here = seen.arm == seen.arms.index(arm.name)
    judged = ("judged_quality",) if experiment.judge else ()
    means = {
        metric: arm_mean(_sums(experiment, seen, arm.name, metric, adjusted=False))
        for metric in (*METRICS, *experiment.metrics)
        if metric in (*seen.columns, *judged) or experiment.is_ratio(metric)
    }
    return ArmReport(
        name=arm.name,
        policy=arm.policy,
        num_units=len(np.unique(seen.unit[here])),
        num_requests=int(here.sum()),
        means={metric: mean for metric, mean in means.items() if mean.num_units},
        stopped=stopped,
    )


def _periods(
    experiment: Experiment, allocations: Sequence[WeightsSince], stopped_s: Mapping[str, float]
) -> tuple[WeightsSince, ...]:
    """Return the weights that counted, in order of time: those of stopped arms are zero."""
    configured = {arm.name: arm.weight for arm in experiment.arms}
    history = [WeightsSince(time_s=-math.inf, weights=configured), *allocations]
    periods = []
    for time_s in sorted({since.time_s for since in history} | set(stopped_s.values())):
        weights = [since.weights for since in history if since.time_s <= time_s][-1]
        counted = {
            name: weight
            for name, weight in weights.items()
            if time_s < stopped_s.get(name, math.inf)
        }
        periods.append(WeightsSince(time_s=time_s, weights=counted))
    return tuple(periods)


def _sample_ratio(
    experiment: Experiment, seen: Observations, periods: Sequence[WeightsSince]
) -> SampleRatio:
    """Compare units per arm with what each period's weights promised, given its total."""
    names = [arm.name for arm in experiment.arms]
    arm_U, time_U = seen.first_seen()
    period_U = np.searchsorted([since.time_s for since in periods], time_U, side="right") - 1
    observed = np.zeros(len(names))
    expected = np.zeros(len(names))
    for period, since in enumerate(periods):
        shares = np.array([since.weights.get(name, 0.0) for name in names])
        here = arm_U[(period_U == period) & (arm_U < len(names))]
        counts = np.bincount(here, minlength=len(names))
        # A few units still arrive in an arm after it stopped: no sign of a broken split.
        counts = np.where(shares > 0, counts, 0)
        observed += counts
        expected += counts.sum() * shares / shares.sum() if shares.sum() else 0.0
    return sample_ratio(names, observed.astype(int).tolist(), expected.tolist())
