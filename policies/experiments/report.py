"""What may be said of an experiment now: numbers, a sentence that says what to do, a picture.

Sample-ratio mismatch comes first: if the arms do not hold as many units as they should, units went
missing or were misassigned, groups are not comparable, and no difference between them may be
believed (Fabijan et al. 2019).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pydantic_core import to_jsonable_python

from policies.experiments import sequences
from policies.experiments.effects import ArmMean
from policies.experiments.experiment import Experiment
from policies.pages import new_figure, png

ALARM_P = 0.001


@dataclass(frozen=True, kw_only=True)
class SampleRatio:
    """Units seen and expected per arm, and χ²'s p for their difference."""

    arms: tuple[str, ...]
    observed: tuple[int, ...]
    expected: tuple[float, ...]
    p: float

    @property
    def alarm(self) -> bool:
        """Whether the mismatch is too large for chance (p < 0.001)."""
        return self.p < ALARM_P


def sample_ratio(
    arms: Sequence[str], observed: Sequence[int], expected: Sequence[float]
) -> SampleRatio:
    """Compare `observed` units with relative `expected` shares (arms with share 0 left out)."""
    from scipy.stats import chi2  # noqa: PLC0415 - heavy, and a server waits

    kept = [i for i, share in enumerate(expected) if share > 0]
    total, shares = sum(observed[i] for i in kept), sum(expected[i] for i in kept)
    wanted = [total * expected[i] / shares for i in kept] if shares else []
    statistic = sum(
        (observed[i] - want) ** 2 / want for i, want in zip(kept, wanted, strict=True) if want
    )
    return SampleRatio(
        arms=tuple(arms[i] for i in kept),
        observed=tuple(observed[i] for i in kept),
        expected=tuple(wanted),
        p=float(chi2.sf(statistic, len(kept) - 1)) if total and len(kept) > 1 else 1.0,
    )


Verdict: TypeAlias = Literal["blocked", "too_early", "ship", "keep_control", "continue"]


@dataclass(frozen=True, kw_only=True)
class ArmReport:
    """One arm: its units, requests and the mean of every metric that has values."""

    name: str
    policy: str
    num_units: int
    num_requests: int
    means: dict[str, ArmMean]
    stopped: bool = False


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One arm against the control on one metric.

    [`low`, `high`] holds the true difference at every look at once, together with the intervals
    of its family, with probability 1 - alpha. `p` is always valid and corrected for the family's
    size (Bonferroni). `better` is None while the interval contains zero. `variance_kept` is what
    CUPED left of the variance, `power` the probability that this much data would show the
    minimum effect (for secondary metrics two points of a share, or 5% of the control's mean).
    With Benjamini-Hochberg p is that method's (false discoveries are a share alpha of all), and the
    interval is at the level that goes with it (Benjamini & Yekutieli 2005). `segment` and `part`
    say in which part of the traffic, None: in all of it.
    """

    metric: str
    treatment: str
    control: str
    estimate: float
    se: float
    low: float
    high: float
    p: float
    control_mean: float
    relative: float
    better: bool | None
    variance_kept: float
    power: float
    segment: str | None = None
    part: str | None = None


@dataclass(frozen=True, kw_only=True)
class GuardrailReport:
    """Whether an arm breached a guardrail: `harm_low` is the least harm the data allow."""

    metric: str
    treatment: str
    harm: float
    harm_low: float
    limit: float
    breached: bool


@dataclass(frozen=True, kw_only=True)
class Advice:
    """A verdict, the arm to ship if there is one, a sentence for a person, and caveats."""

    verdict: Verdict
    winner: str | None
    recommendation: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report(Advice):
    """All of it."""

    name: str
    unit: str
    primary_metric: str
    direction: str
    alpha: float
    num_units: int
    num_requests: int
    num_crossed: int
    arms: tuple[ArmReport, ...]
    primary: tuple[Comparison, ...]
    secondary: tuple[Comparison, ...]
    segments: tuple[Comparison, ...]
    guardrails: tuple[GuardrailReport, ...]
    sample_ratio: SampleRatio

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data; what is not known (NaN, infinite) as null."""
        data: dict[str, Any] = to_jsonable_python(self, inf_nan_mode="null")
        data["sample_ratio"]["alarm"] = self.sample_ratio.alarm
        return data


def advise(
    experiment: Experiment,
    *,
    arms: Sequence[ArmReport],
    primary: Sequence[Comparison],
    guardrails: Sequence[GuardrailReport],
    ratio: SampleRatio,
    min_units: int,
    stopped: Sequence[str] = (),
    known_best: str | None = None,
) -> Advice:
    """Return what to do, blocked by a sample-ratio alarm and by breached guardrails.

    `known_best` is the arm that a search for the best one has found.
    """
    notes = tuple(_notes(experiment, arms, guardrails, stopped))

    def advice(verdict: Verdict, sentence: str, winner: str | None = None) -> Advice:
        return Advice(verdict=verdict, winner=winner, recommendation=sentence, notes=notes)

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
    if known_best is not None:
        keep = known_best == control
        return advice(
            "keep_control" if keep else "ship",
            f"{'Keep' if keep else 'Ship'} {known_best!r}: of {len(arms)} arms it is the best in "
            f"{metric} at confidence {1 - experiment.alpha:.0%}, whenever one looks; you may stop "
            "now.",
            known_best,
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
    smallest = experiment.primary.smallest(running[0].control_mean)
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
    moving = {
        "thompson": ("Thompson sampling", "Confirm the winner with fixed weights."),
        "best_arm": ("Top-two sampling", "What is said of the best arm holds all the same."),
    }
    if experiment.allocation.kind in moving:
        sampling, but = moving[experiment.allocation.kind]
        notes.append(
            f"{sampling} moves the weights with the data: intervals, p and the sample-ratio test "
            f"are approximate. {but}"
        )
    rated = [arm for arm in arms if "feedback_rate" in arm.means]
    counts = [
        (round(arm.means["feedback_rate"].mean * arm.num_requests), arm.num_requests)
        for arm in rated
    ]
    table = [[yes, total - yes] for yes, total in counts]
    measurable = len(table) > 1 and all(map(sum, zip(*table, strict=True)))
    if experiment.primary.metric in ("quality", "judged_quality") and measurable:
        from scipy.stats import chi2_contingency  # noqa: PLC0415 - heavy, and a server waits

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


@dataclass(frozen=True, kw_only=True)
class Point:
    """The primary comparison as it stood after `num_requests` requests."""

    time_s: float
    num_requests: int
    estimate: float
    low: float
    high: float


_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def draw(experiment: Experiment, report: Report, paths: Mapping[str, Sequence[Point]]) -> bytes:
    """Return a PNG: the primary effect of each treatment in `paths` after every request."""
    figure, [axes] = new_figure()
    for colour, (treatment, path) in zip(_COLOURS, paths.items(), strict=False):
        shown = _legible(path)
        x = [point.num_requests for point in shown]
        axes.plot(x, [p.estimate for p in shown], color=colour, label=treatment, linewidth=1.8)
        axes.fill_between(
            x, [p.low for p in shown], [p.high for p in shown], color=colour, alpha=0.18
        )
    axes.axhline(0, color="black", linewidth=0.8)
    metric = experiment.metric(report.primary_metric)
    axes.set_xlabel("requests")
    unit = "" if metric.is_share else f" ({metric.unit})"
    axes.set_ylabel(f"{metric.name} minus {experiment.control_arm.name}'s{unit}")
    axes.set_title(f"{report.name}: {1 - report.alpha:.0%} confidence sequence", loc="left")
    axes.legend(loc="best", frameon=False)
    figure.supxlabel(report.recommendation, fontsize=8, wrap=True)
    return png(figure)


def _legible(path: Sequence[Point]) -> list[Point]:
    """Leave out the first looks, whose intervals would dwarf all later ones."""
    widths = [point.high - point.low for point in path]
    final = widths[-1] if widths else math.inf
    kept = [point for point, width in zip(path, widths, strict=True) if width <= 8 * final]
    return [point for point in kept if math.isfinite(point.high)]
