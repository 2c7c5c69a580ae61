"""One sentence that says what to do, and why: the reading of a report's numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import chi2_contingency

from policies.experiments import sequences
from policies.experiments.config import Experiment
from policies.experiments.mismatch import ALARM_P, SampleRatio
from policies.experiments.report import ArmReport, Comparison, GuardrailReport, Verdict


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A verdict, the arm to ship if there is one, and the words for both."""

    verdict: Verdict
    winner: str | None
    sentence: str
    notes: tuple[str, ...]


def advise(
    experiment: Experiment,
    *,
    arms: Sequence[ArmReport],
    primary: Sequence[Comparison],
    guardrails: Sequence[GuardrailReport],
    ratio: SampleRatio,
    min_units: int,
    stopped: Sequence[str] = (),
) -> Advice:
    """Return what to do, blocked by a sample-ratio alarm and by breached guardrails."""
    notes = tuple(_notes(experiment, arms, guardrails, stopped))

    def advice(verdict: Verdict, sentence: str, winner: str | None = None) -> Advice:
        return Advice(verdict=verdict, winner=winner, sentence=sentence, notes=notes)

    control, metric = experiment.control_arm.name, experiment.primary.metric
    if ratio.alarm:
        seen = ", ".join(
            f"{arm} {count} (expected {want:.0f})"
            for arm, count, want in zip(ratio.arms, ratio.observed, ratio.expected, strict=True)
        )
        return advice(
            "blocked",
            f"Do not conclude anything: the arms' sizes do not match their weights ({seen}; "
            f"p = {ratio.p:.1g}). Find out which units are missing or misassigned first.",
        )
    barred = {found.treatment for found in guardrails if found.breached} | set(stopped)
    running = [found for found in primary if found.treatment not in barred]
    if not running:
        return advice(
            "keep_control", f"Keep {control!r}: a guardrail stopped every other arm.", control
        )
    if not all(math.isfinite(found.high) for found in running):
        return advice(
            "too_early",
            f"Too early: at least {min_units} units per arm with a value of {metric} that varies "
            "are needed before anything can be said.",
        )
    better = [found for found in running if found.better]
    if better:
        best = max(better, key=lambda found: abs(found.estimate))
        return advice(
            "ship",
            f"Ship {best.treatment!r}: its {metric} is {_change(best)} than that of {control!r} "
            f"(p = {best.p:.2g}, valid at every look); you may stop now.",
            best.treatment,
        )
    if all(found.better is False for found in running):
        worst = "; ".join(f"{found.treatment!r} is {_change(found)}" for found in running)
        return advice(
            "keep_control", f"Keep {control!r}: in {metric}, {worst}; you may stop now.", control
        )
    smallest = _smallest(experiment, running[0])
    if all(_best_case(experiment, found) < smallest for found in running):
        return advice(
            "keep_control",
            f"Keep {control!r}: no arm can be better in {metric} by the minimum effect of "
            f"{smallest:.3g}; you may stop now.",
            control,
        )
    units = sum(arm.num_units for arm in arms)
    more = max(
        _more_units(experiment, found, smallest, units, family=len(primary)) for found in running
    )
    return advice(
        "continue",
        f"Continue: no difference in {metric} is certain yet; about {more:,} more units would "
        f"show one of {smallest:.3g} with 90% probability.",
    )


def _notes(
    experiment: Experiment,
    arms: Sequence[ArmReport],
    guardrails: Sequence[GuardrailReport],
    stopped: Sequence[str],
) -> list[str]:
    notes = []
    for found in guardrails:
        if found.breached:
            action = "was stopped" if found.treatment in stopped else "is being stopped"
            notes.append(
                f"The arm {found.treatment!r} {action}: its {found.metric} is worse by at least "
                f"{found.harm_low:.3g}, allowed is {found.limit:.3g}."
            )
    if experiment.allocation.kind == "thompson":
        notes.append(
            "Thompson sampling moves the weights with the data: intervals, p and the sample-ratio "
            "test are approximate. Confirm the winner with fixed weights."
        )
    rated = [arm for arm in arms if "feedback_rate" in arm.means]
    counts = [
        (round(arm.means["feedback_rate"].mean * arm.num_requests), arm.num_requests)
        for arm in rated
    ]
    table = [[yes, total - yes] for yes, total in counts]
    measurable = len(table) > 1 and all(map(sum, zip(*table, strict=True)))
    if experiment.primary.metric == "quality" and measurable:
        p = float(chi2_contingency(table).pvalue)
        if p < ALARM_P:
            rates = ", ".join(f"{arm.name} {arm.means['feedback_rate'].mean:.1%}" for arm in rated)
            notes.append(
                f"Feedback arrives at different rates ({rates}; p = {p:.1g}): those who rate may "
                "not be alike, so the difference in quality may not be the policies'."
            )
    return notes


def _change(found: Comparison) -> str:
    word = "higher" if found.estimate > 0 else "lower"
    low, high = sorted((abs(found.low), abs(found.high)))
    return f"{word} by {abs(found.estimate):.3g} ({low:.3g} to {high:.3g})"


def _smallest(experiment: Experiment, found: Comparison) -> float:
    goal = experiment.primary
    return goal.minimum_effect * (abs(found.control_mean) if goal.relative else 1.0)


def _best_case(experiment: Experiment, found: Comparison) -> float:
    """The most by which `found` could be better."""
    return found.high if experiment.direction == "increase" else -found.low


def _more_units(
    experiment: Experiment, found: Comparison, smallest: float, units: int, *, family: int
) -> int:
    """How many units are missing until the minimum effect would show with 90% probability."""
    alpha = experiment.alpha / family
    rho = sequences.rho_for(smallest, alpha=alpha)
    low, high = 1.0, 1e9
    for _ in range(60):
        factor = math.sqrt(low * high)
        se = found.se / math.sqrt(factor)
        enough = sequences.power_at(smallest, se, rho=rho, alpha=alpha) >= 0.9
        low, high = (low, factor) if enough else (factor, high)
    return max(0, math.ceil(units * (high - 1)))
