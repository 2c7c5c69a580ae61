"""Simulations of experiments: arms that share a machine, the best of many arms, and a judge.

    python -m tests.bench.experiments_simulated [--days 10] [--races 300] [--trials 500]
        [--repeat 20] [--seed 0]

**Shared machine.** One server, M/M/1: 0.7 requests a second, a mean service time of 1 s under the
control's policy and 1.1 s under the treatment's. What the treatment does to latency when it serves
everybody follows from queueing theory: a mean stay of 1/(μ - λ) gives 1/(1/1.1 - 0.7) - 1/(1 - 0.7)
= 1.449 s more. Request by request, both arms wait in the same queue, so a split sees 0.1 s only;
blocks of 20 minutes see all of it. Draws both confidence sequences to docs/experiments.

**Best arm.** Arms with success rates of which one is best, looked at after every 50 units of each
arm on average: top-two sampling against an even split, both with the same stopping rule.

**Judge.** Arms that are alike, or of which one is better by five points; one in five answers is
rated, a judge grades all of them. It takes answers of the treatment for better than they are (by
ten points) and is otherwise right more or less often. Who asks the judge alone, who asks people
alone, and who calibrates the judge by people, each looking after every 200 answers per arm.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from policies.experiments.analysis import analyse, trajectory
from policies.experiments.assignment import Assigner, Visit, adaptive_weights
from policies.experiments.effects import ArmMean, Observation, Observations
from policies.experiments.experiment import Allocation, Arm, Experiment, Switchback, Unit
from policies.experiments.metrics import Goal
from policies.experiments.sequences import known_best
from policies.tables import text_table

RATE, SERVICE_S = 0.7, {"control": 1.0, "slower": 1.1}
TRUTH_S = 1 / (1 / SERVICE_S["slower"] - RATE) - 1 / (1 / SERVICE_S["control"] - RATE)
START_S = 1_800_000_000.0
PLOT = Path(__file__).parents[2] / "docs" / "experiments" / "switchback.png"


def shared_machine(unit: Unit) -> Experiment:
    """Return the experiment, with requests or blocks of time as units."""
    return Experiment(
        name=f"by {unit}",
        arms=tuple(Arm(name=name, policy=name, weight=0.5) for name in SERVICE_S),
        unit=unit,
        primary=Goal(metric="latency_s", minimum_effect=0.5),
        switchback=Switchback(block_minutes=20, washout_minutes=5) if unit == "block" else None,
    )


def queue(experiment: Experiment, *, days: float, seed: int) -> Observations:
    """Return what `experiment` sees of a server that its arms share (Lindley's recursion)."""
    rng = np.random.default_rng(seed)
    gaps_s = rng.exponential(1 / RATE, size=int(days * 86_400 * RATE))
    work = rng.exponential(1.0, size=len(gaps_s))
    assigner = Assigner([experiment])
    now_s, wait_s, rows = START_S, 0.0, []
    for number, (gap_s, one) in enumerate(zip(gaps_s.tolist(), work.tolist(), strict=True)):
        now_s += gap_s
        wait_s = max(0.0, wait_s - gap_s)
        visit = Visit(request_id=f"{seed}-{number}", model="auto")
        found = assigner.assign(visit, now_s=now_s)
        assert found is not None
        wait_s += one * SERVICE_S[found.policy]
        if found.arm is not None:
            rows.append(
                Observation(
                    unit=found.unit,
                    arm=found.arm,
                    propensity=found.propensity,
                    time_s=now_s,
                    values={"latency_s": wait_s},
                )
            )
    return Observations.from_rows(rows, arms=tuple(SERVICE_S))


@dataclass(frozen=True, kw_only=True)
class Race:
    """How a search for the best arm ended: which arm, None if none, after how many units."""

    found: str | None
    num_units: int


def race(
    rates: tuple[float, ...], *, kind: str, rng: np.random.Generator, most: int = 200_000
) -> Race:
    """Give units to arms with success `rates` until the best is known, looking again and again."""
    names = [f"arm {index}" for index in range(len(rates))]
    experiment = Experiment(
        name="race",
        arms=tuple(Arm(name=name, policy=name, weight=1 / len(rates)) for name in names),
        primary=Goal(minimum_effect=0.05),
        alpha=0.1,
        allocation=Allocation(kind="best_arm", floor=0.02),
    )
    weights = dict.fromkeys(names, 1 / len(names))
    num, won = np.zeros(len(rates)), np.zeros(len(rates))
    while num.sum() < most:
        new = rng.multinomial(50 * len(rates), [weights[name] for name in names])
        num += new
        won += rng.binomial(new, rates)
        mean = won / np.maximum(num, 1)
        means = {
            name: ArmMean(mean=float(m), se=float(np.sqrt(m * (1 - m) / n)), num_units=int(n))
            for name, m, n in zip(names, mean, num, strict=True)
        }
        found = known_best(means, delta=experiment.alpha, smallest=0.05, increase=True)
        if found is not None:
            return Race(found=found, num_units=int(num.sum()))
        if kind == "top-two":
            weights = adaptive_weights(experiment, means, rng=rng)
    return Race(found=None, num_units=int(num.sum()))


FIELDS = {
    "four, one ahead by 5 points": (0.50, 0.55, 0.45, 0.50),
    "eight, one ahead by 5 points": (0.50, 0.55, 0.50, 0.50, 0.45, 0.40, 0.45, 0.50),
    "eight, two close, the rest behind": (0.60, 0.65, 0.40, 0.40, 0.45, 0.40, 0.45, 0.50),
}


def race_table(num_races: int, *, seed: int) -> str:
    """Return what each way took in the mean and how often it was wrong, as Markdown.

    With 95% intervals: of the share by bootstrap over races, of errors by Clopper and Pearson.
    """
    from scipy.stats import binomtest

    lines = [
        "| arms | even split: units | top-two: units | fewer | wrong: even split | top-two |",
        "|---|---|---|---|---|---|",
    ]
    for name, rates in FIELDS.items():
        best = f"arm {int(np.argmax(rates))}"
        units, wrong = {}, {}
        for kind in ("even", "top-two"):
            ran = [
                race(rates, kind=kind, rng=np.random.default_rng([seed, number]))
                for number in range(num_races)
            ]
            units[kind] = np.array([one.num_units for one in ran])
            times = sum(one.found != best for one in ran)
            most = binomtest(times, num_races).proportion_ci().high
            wrong[kind] = f"{times} of {num_races} (at most {most:.1%})"
        drawn = np.random.default_rng(seed).integers(num_races, size=(2, 2000, num_races))
        even, top_two = (units[k][d].mean(axis=1) for k, d in zip(units, drawn, strict=True))
        low, high = np.quantile(1 - top_two / even, (0.025, 0.975))
        fewer = 1 - units["top-two"].mean() / units["even"].mean()
        lines.append(
            f"| {name} | {units['even'].mean():,.0f} | {units['top-two'].mean():,.0f} | "
            f"{fewer:.0%} ({low:.0%} to {high:.0%}) | {wrong['even']} | {wrong['top-two']} |"
        )
    return "\n".join(lines)


JUDGES = {"no better than a coin": 0.0, "fair": 0.6, "good": 0.9}


def judged(
    num: int, *, lift: float, skill: float, bias: float, share: float, rng: np.random.Generator
) -> Observations:
    """Return `num` answers, right in 60% and under the treatment in `lift` more; some are rated.

    The judge sees the truth with probability `skill`, and else tosses a coin; `bias` is the chance
    that it takes a wrong answer of the treatment's for right.
    """
    treated = rng.random(num) < 0.5
    right = rng.random(num) < 0.6 + lift * treated
    grade = np.where(rng.random(num) < skill, right, rng.random(num) < 0.5)
    grade |= treated & (rng.random(num) < bias / 0.4)
    rated = rng.random(num) < share
    return Observations(
        arms=("control", "treatment"),
        arm=treated.astype(np.int64),
        unit=np.arange(num, dtype=np.int64),
        propensity=np.full(num, 0.5),
        time_s=np.arange(num, dtype=np.float64),
        columns={
            "quality": np.where(rated, right, np.nan),
            "grade": grade.astype(np.float64),
        },
    )


def judged_experiment(metric: str) -> Experiment:
    """Return the experiment that decides by `metric`."""
    return Experiment(
        name="judged",
        arms=tuple(Arm(name=name, policy=name, weight=0.5) for name in ("control", "treatment")),
        unit="request",
        primary=Goal(metric=metric, minimum_effect=0.05),
        judge="judge",
    )


def coverage(
    metric: str, seen: Observations, lift: float, *, every: int
) -> tuple[float, float, bool]:
    """Return the estimate at the end, its interval's width, and whether it held at every look."""
    experiment = judged_experiment(metric)
    found = trajectory(
        experiment, seen, experiment.treatments[0], num_points=len(seen) // (2 * every)
    )
    held = all(point.low <= lift <= point.high for point in found)
    return found[-1].estimate, found[-1].high - found[-1].low, held


def judge_table(num_trials: int, *, seed: int, num: int = 4000) -> str:
    """Return how far each way is off and how wide its intervals are, as Markdown."""
    lines = [
        "| judge | true lift | way | mean estimate | mean width | missed the truth at some look |",
        "|---|---|---|---|---|---|",
    ]
    ways = {"grade": "judge alone", "quality": "people alone", "judged_quality": "both"}
    for judge, skill in JUDGES.items():
        for lift in (0.0, 0.05):
            trials = [
                judged(
                    num, lift=lift, skill=skill, bias=0.1, share=0.2,
                    rng=np.random.default_rng([seed, number]),
                )
                for number in range(num_trials)
            ]  # fmt: skip
            for metric, way in ways.items():
                found = [coverage(metric, seen, lift, every=200) for seen in trials]
                estimate, width, held = (np.mean(column) for column in zip(*found, strict=True))
                lines.append(
                    f"| {judge} | {lift:.2f} | {way} | {estimate:+.3f} | {width:.3f} "
                    f"| {1 - held:.1%} |"
                )
    return "\n".join(lines)


def draw(days: float, seed: int) -> str:
    """Draw both confidence sequences; return what both found at the end, as a table."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    lines = [("unit", "units", "found", "interval")]
    for unit, colour in (("request", "#D55E00"), ("block", "#0072B2")):
        experiment = shared_machine(unit)  # type: ignore[arg-type]
        seen = queue(experiment, days=days, seed=seed)
        points = trajectory(experiment, seen, experiment.treatments[0], num_points=120)
        known = [point for point in points if np.isfinite(point.high)]
        hours = [(point.time_s - START_S) / 3600 for point in known]
        axes.fill_between(
            hours, [p.low for p in known], [p.high for p in known], alpha=0.2, color=colour
        )
        axes.plot(hours, [p.estimate for p in known], color=colour, label=f"split by {unit}")
        [found] = analyse(experiment, seen).primary
        lines.append(
            (
                unit,
                f"{seen.num_units:,}",
                f"{found.estimate:+.3f} s",
                f"{found.low:+.3f} to {found.high:+.3f}",
            )
        )
    axes.axhline(TRUTH_S, color="black", linestyle="--", label="what serving everybody does")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(
        xlabel="hours",
        ylabel="latency, treatment minus control (s)",
        ylim=(-0.5, 3.5),
        title="Arms that share a machine: always-valid 95% intervals",
    )
    axes.legend(loc="upper right")
    figure.savefig(PLOT)
    return f"truth: {TRUTH_S:+.3f} s\n{text_table(lines)}"


def repeated(days: float, num: int, *, seed: int) -> str:
    """Return what both ways find in `num` other such runs, as Markdown."""
    lines = [
        "| unit | mean estimate | least and most | interval without the truth, at the end | ever |",
        "|---|---|---|---|---|",
    ]
    for unit in ("request", "block"):
        experiment = shared_machine(unit)  # type: ignore[arg-type]
        found, missed_last, missed_ever = [], 0, 0
        for number in range(1, num + 1):
            seen = queue(experiment, days=days, seed=seed + number)
            points = trajectory(experiment, seen, experiment.treatments[0], num_points=30)
            missed = [not p.low <= TRUTH_S <= p.high for p in points if np.isfinite(p.high)]
            found.append(points[-1].estimate)
            missed_last += missed[-1]
            missed_ever += any(missed)
        lines.append(
            f"| {unit} | {np.mean(found):+.3f} s | {min(found):+.3f} to {max(found):+.3f} s "
            f"| {missed_last} of {num} | {missed_ever} of {num} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--days", type=float, default=10)
    parser.add_argument("--races", type=int, default=300)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--repeat", type=int, default=0, help="other runs of the shared machine")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.trials:
        print(judge_table(given.trials, seed=given.seed))
    if given.days:
        print(draw(given.days, given.seed))
    if given.repeat:
        print(repeated(given.days or 5, given.repeat, seed=given.seed))
    if given.races:
        print(race_table(given.races, seed=given.seed))
