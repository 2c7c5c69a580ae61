"""Reports: the right winner, blocked when the split is broken, stopped when an arm does harm."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from policies.experiments.analysis import (
    WeightsSince,
    analyse,
    arm_names,
    check_guardrails,
    trajectory,
)
from policies.experiments.assignment import Assigner, Visit
from policies.experiments.effects import Observation, Observations
from policies.experiments.experiment import Allocation, Arm, Experiment
from policies.experiments.metrics import Goal, Guardrail, OwnMetric
from policies.experiments.report import draw


def experiment(**changes: Any) -> Experiment:
    """Control "base" against "new", half each."""
    arms = (
        Arm(name="base", policy="base", weight=0.5),
        Arm(name="new", policy="learned", weight=0.5),
    )
    return Experiment(
        **{"name": "e", "arms": arms, "primary": Goal(minimum_effect=0.05), **changes}
    )


def simulate(
    running: Experiment,
    rates: Mapping[str, float],
    *,
    num_users: int,
    seed: int,
    usd: Mapping[str, float] | None = None,
    errors: Mapping[str, float] | None = None,
    rated: Mapping[str, float] | None = None,
) -> Observations:
    """Users with 1 to 5 requests and a user effect; `rates` are the arms' chances of success."""
    rng = np.random.default_rng(seed)
    assigner = Assigner([running])
    rows = []
    for user in range(num_users):
        found = assigner.assign(
            Visit(request_id=f"r{user}", model="auto", user=f"u{seed}-{user}"), now_s=0
        )
        assert found is not None
        assert found.arm is not None
        ease = rng.normal(0, 0.1)
        for _ in range(rng.integers(1, 6)):
            hard = rng.integers(10, 200)
            chance = rates[found.arm] + ease - (hard - 105) / 1000
            quality = float(rng.random() < chance)
            has = rng.random() < (rated or {}).get(found.arm, 1.0)
            rows.append(
                Observation(
                    unit=found.unit,
                    arm=found.arm,
                    propensity=found.propensity,
                    time_s=float(rng.uniform(0, 86_400)),
                    values={
                        "quality": quality if has else None,
                        "feedback_rate": float(has),
                        "usd": float(rng.gamma(4, (usd or {}).get(found.arm, 1.0) / 4)),
                        "error_rate": float(rng.random() < (errors or {}).get(found.arm, 0.01)),
                        "prompt_tokens": float(hard),
                    },
                )
            )
    return Observations.from_rows(rows, arms=arm_names(running))


def test_the_better_arm_is_named() -> None:
    """A true lift of 12 points over 3,000 users is found, with cost beside it (seed 1)."""
    running = experiment(secondary=("usd",), covariates=("prompt_tokens",))
    seen = simulate(running, {"base": 0.5, "new": 0.62}, usd={"new": 0.7}, num_users=3000, seed=1)
    report = analyse(running, seen)
    assert (report.verdict, report.winner) == ("ship", "new")
    [quality], [usd] = report.primary, report.secondary
    assert quality.low < 0.12 < quality.high
    assert quality.p < 0.001
    assert quality.power > 0.5
    assert 0.9 < quality.variance_kept < 1
    assert usd.better is True
    assert usd.relative == pytest.approx(-0.3, abs=0.05)
    assert "Ship 'new'" in report.recommendation
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["winner"] == "new"


def test_the_worse_arm_is_not_shipped() -> None:
    """With the signs turned round, the advice is to keep the control (seed 2)."""
    running = experiment()
    seen = simulate(running, {"base": 0.62, "new": 0.5}, num_users=3000, seed=2)
    assert analyse(running, seen).verdict == "keep_control"


def test_equal_arms_are_told_to_stop_once_nothing_worthwhile_can_hide() -> None:
    """A/A with plenty of data: the interval excludes the minimum effect (seed 3)."""
    running = experiment(primary=Goal(minimum_effect=0.08))
    seen = simulate(running, {"base": 0.5, "new": 0.5}, num_users=4000, seed=3)
    report = analyse(running, seen)
    assert report.verdict == "keep_control"
    assert "minimum effect of 0.08" in report.recommendation


def test_little_data_says_how_much_is_missing() -> None:
    """With 200 users the advice is to go on, and for about how long; with 20, nothing (seed 4)."""
    running = experiment()
    seen = simulate(running, {"base": 0.5, "new": 0.52}, num_users=200, seed=4)
    report = analyse(running, seen)
    assert report.verdict == "continue"
    assert "more units" in report.recommendation
    few = analyse(running, seen.first(40))
    assert few.verdict == "too_early"
    assert few.to_json()["primary"][0]["high"] is None


def test_a_broken_split_blocks_every_conclusion() -> None:
    """A lift that looks certain is not reported when one arm lost a fifth of its units (seed 5)."""
    running = experiment()
    seen = simulate(running, {"base": 0.5, "new": 0.65}, num_users=3000, seed=5)
    lost = (seen.arm == 0) & (seen.unit % 5 == 0)
    rows = [
        Observation(
            unit=str(seen.unit[i]), arm=seen.arms[seen.arm[i]], propensity=0.5,
            time_s=float(seen.time_s[i]), values={"quality": float(seen.columns["quality"][i])},
        )
        for i in np.flatnonzero(~lost)
    ]  # fmt: skip
    report = analyse(running, Observations.from_rows(rows, arms=("base", "new")))
    assert (report.verdict, report.winner) == ("blocked", None)
    assert report.sample_ratio.alarm
    assert analyse(running, seen).verdict == "ship"


def test_a_harmful_arm_breaches_its_guardrail_and_cannot_win() -> None:
    """An arm that is better but fails 8% more often is barred, and the note says so (seed 6)."""
    running = experiment(guardrails=(Guardrail(metric="error_rate", limit=0.03),))
    harm = {"base": 0.02, "new": 0.10}
    seen = simulate(running, {"base": 0.5, "new": 0.7}, errors=harm, num_users=3000, seed=6)
    report = analyse(running, seen)
    assert report.guardrails[0].breached
    assert report.guardrails[0].harm_low > 0.03
    assert (report.verdict, report.winner) == ("keep_control", "base")
    assert "error_rate is worse by at least" in report.notes[0]


def test_guardrails_are_quiet_within_their_limit() -> None:
    """Harm below the limit never trips: 20 A/A experiments, looked at 10 times each (seed 7)."""
    running = experiment(guardrails=(Guardrail(metric="error_rate", limit=0.02),))
    for run in range(20):
        errors = {"base": 0.05, "new": 0.06}
        seen = simulate(
            running, {"base": 0.5, "new": 0.5}, errors=errors, num_users=300, seed=700 + run
        )
        looks = [check_guardrails(running, seen.first(n)) for n in range(90, 900, 90)]
        assert not any(found.breached for look in looks for found in look)


def test_a_stopped_arm_is_compared_until_it_stopped() -> None:
    """What the control did after the stop plays no part in the stopped arm's comparison."""
    running = experiment()
    seen = simulate(running, {"base": 0.5, "new": 0.5}, num_users=500, seed=8)
    half = analyse(running, seen, stopped_s={"new": 43_200.0}).primary[0]
    assert half == analyse(running, seen.before(43_200.0)).primary[0]


def test_more_arms_and_metrics_widen_the_intervals() -> None:
    """Bonferroni: with three treatments each interval is wider than with one (same data)."""
    seen = simulate(experiment(), {"base": 0.5, "new": 0.5}, num_users=500, seed=9)
    many = experiment(
        arms=tuple(
            Arm(name=name, policy="p", weight=0.25) for name in ("base", "new", "third", "fourth")
        )
    )
    rows = Observations(
        arms=arm_names(many), arm=seen.arm, unit=seen.unit, propensity=seen.propensity,
        time_s=seen.time_s, columns=seen.columns,
    )  # fmt: skip
    one = analyse(experiment(), seen).primary[0]
    three = analyse(many, rows).primary[0]
    assert three.estimate == one.estimate
    assert three.high - three.low > 1.05 * (one.high - one.low)


def test_false_positives_of_the_whole_report_stay_below_alpha() -> None:
    """Clustered users, CUPED, 10 looks each: at most 9 of 100 A/A experiments conclude (seed 10).

    If the true rate were the full 5%, P(Bin(100, 0.05) > 9) = 0.03; it is about 1%, which makes
    a false failure less likely than 1e-6.
    """
    running = experiment(covariates=("prompt_tokens",))
    concluded = 0
    for run in range(100):
        seen = simulate(running, {"base": 0.5, "new": 0.5}, num_users=200, seed=1000 + run)
        looks = trajectory(running, seen, running.treatments[0], num_points=10)
        concluded += any(point.low > 0 or point.high < 0 for point in looks)
    assert concluded <= 9


def test_units_that_changed_arms_keep_only_their_first_one() -> None:
    """Rows after a move are left out and counted."""
    rows = [
        Observation(unit="u", arm=arm, propensity=0.5, time_s=t, values={"usd": usd})
        for t, arm, usd in ((3.0, "new", 9.0), (1.0, "base", 1.0), (2.0, "base", 2.0))
    ]
    seen = Observations.from_rows(rows, arms=("base", "new"))
    assert (seen.num_crossed, seen.columns["usd"].tolist()) == (1, [1.0, 2.0])


def test_changed_weights_raise_no_false_alarm() -> None:
    """Units are expected by the weights of their own time, not by today's."""
    rng = np.random.default_rng(11)
    rows = [
        Observation(
            unit=f"u{i}",
            arm="new" if rng.random() < (0.1 if i < 2000 else 0.5) else "base",
            propensity=0.5,
            time_s=float(i),
            values={"quality": 1.0},
        )
        for i in range(4000)
    ]
    seen = Observations.from_rows(rows, arms=("base", "new"))
    history = [
        WeightsSince(time_s=0, weights={"base": 0.9, "new": 0.1}),
        WeightsSince(time_s=2000, weights={"base": 0.5, "new": 0.5}),
    ]
    assert not analyse(experiment(), seen, allocations=history).sample_ratio.alarm
    assert analyse(experiment(), seen).sample_ratio.alarm


def test_changed_weights_do_not_mix_up_the_periods() -> None:
    """An arm that was ramped up while everything got easier gains nothing by it (seed 12).

    Without weighting by propensities the A/A difference would be 0.16 (Simpson's paradox).
    """
    rng = np.random.default_rng(12)
    rows = []
    for i in range(20_000):
        share, chance = (0.1, 0.3) if i < 10_000 else (0.5, 0.7)
        new = rng.random() < share
        rows.append(
            Observation(
                unit=f"u{i}", arm="new" if new else "base", time_s=float(i),
                propensity=share if new else 1 - share,
                values={"quality": float(rng.random() < chance)},
            )
        )  # fmt: skip
    found = analyse(
        experiment(), Observations.from_rows(rows, arms=("base", "new")),
        allocations=[
            WeightsSince(time_s=0, weights={"base": 0.9, "new": 0.1}),
            WeightsSince(time_s=10_000, weights={"base": 0.5, "new": 0.5}),
        ],
    ).primary[0]  # fmt: skip
    assert abs(found.estimate) < 0.04
    assert found.better is None


def test_unequal_feedback_rates_are_pointed_out() -> None:
    """When users of one arm rate far more often, the report says so (seed 13)."""
    running = experiment()
    rated = {"base": 0.2, "new": 0.4}
    seen = simulate(running, {"base": 0.5, "new": 0.5}, rated=rated, num_users=800, seed=13)
    assert "Feedback arrives at different rates" in analyse(running, seen).notes[0]


def test_the_holdout_is_shown_but_decides_nothing() -> None:
    """Held-out units have a row of their own and no part in comparisons (seed 14)."""
    running = experiment(holdout=0.2)
    rates = {"base": 0.5, "new": 0.5, "holdout": 0.9}
    report = analyse(running, simulate(running, rates, num_users=1500, seed=14))
    held = report.arms[-1]
    assert (held.name, held.policy) == ("holdout", "base")
    assert abs(held.num_units - 300) < 4 * np.sqrt(240)
    assert report.primary[0].better is None
    assert not report.sample_ratio.alarm


def test_an_experiment_without_data_has_a_report() -> None:
    """No row yet: too early, not an exception."""
    report = analyse(
        experiment(secondary=("usd",), guardrails=(Guardrail(metric="usd"),),
                   covariates=("prompt_tokens",), allocation=Allocation(kind="thompson")),
        Observations.from_rows([], arms=("base", "new")),
    )  # fmt: skip
    assert report.verdict == "too_early"
    json.dumps(report.to_json(), allow_nan=False)


def test_the_plot_is_a_png() -> None:
    """The confidence sequence is drawn, also while there is nothing to draw."""
    running = experiment()
    seen = simulate(running, {"base": 0.5, "new": 0.6}, num_users=300, seed=15)
    for part in (seen, seen.first(5)):
        arm = running.treatments[0]
        path = {arm.name: trajectory(running, part, arm, num_points=10)}
        assert draw(running, analyse(running, part), path).startswith(b"\x89PNG")


def _own(running: Experiment, *, effect: float, seed: int, num: int = 3000) -> Observations:
    """Requests with own metrics: "refund" 0 or 1, "items" and "seconds" whose ratio is compared."""
    rng = np.random.default_rng(seed)
    arms = rng.integers(2, size=num)
    items = rng.integers(1, 5, size=num)
    return Observations.from_rows(
        [
            Observation(
                unit=f"u{n}",
                arm=running.arms[arm].name,
                propensity=0.5,
                time_s=float(n),
                values={
                    "refund": float(rng.random() < 0.3 + effect * arm),
                    "items": float(items[n]),
                    "seconds": float(items[n] * (2 + effect * arm) + rng.normal(0, 0.5)),
                },
                parts={"length": "long" if n % 2 else "short"},
            )
            for n, arm in enumerate(arms)
        ],
        arms=arm_names(running),
    )


OWN = {
    "refund": OwnMetric(direction="decrease", kind="binary", minimum_effect=0.02, relative=False),
    "items": OwnMetric(direction="increase"),
    "seconds": OwnMetric(direction="decrease"),
    "pace": OwnMetric(direction="decrease", ratio=("seconds", "items")),
}


def test_metrics_of_ones_own_are_compared_in_their_own_direction() -> None:
    """More refunds are worse; a ratio is that of sums, its error as a regression through zero."""
    running = experiment(metrics=OWN, secondary=("refund", "pace"))
    seen = _own(running, effect=0.1, seed=21)
    refund, pace = analyse(running, seen).secondary
    assert refund.better is False
    assert refund.low > 0
    columns, new = seen.columns, seen.arm == 1
    ratios = [columns["seconds"][here].sum() / columns["items"][here].sum() for here in (new, ~new)]
    assert pace.estimate == pytest.approx(ratios[0] - ratios[1])
    # Jackknife: leave out one request after the other.
    variance = 0.0
    for here in (new, ~new):
        y, d = columns["seconds"][here], columns["items"][here]
        left = (y.sum() - y) / (d.sum() - d)
        variance += (len(y) - 1) / len(y) * float(((left - left.mean()) ** 2).sum())
    assert pace.se == pytest.approx(variance**0.5, rel=0.01)


def test_segments_are_parts_of_the_traffic() -> None:
    """Each part is compared by its own requests alone, and the parts make up the whole."""
    goal = Goal(metric="refund", minimum_effect=0.02)
    running = experiment(metrics=OWN, primary=goal, segments=("length",))
    seen = _own(running, effect=0.1, seed=22)
    long, short = sorted(analyse(running, seen).segments, key=lambda found: str(found.part))
    assert (long.segment, long.part, short.part) == ("length", "long", "short")
    odd = np.arange(len(seen)) % 2 == 1
    means = [seen.columns["refund"][odd & (seen.arm == arm)].mean() for arm in (1, 0)]
    assert long.estimate == pytest.approx(means[0] - means[1])


def test_benjamini_hochberg_agrees_with_its_definition_and_finds_more() -> None:
    """Adjusted p: the least m·p(k)/k from each rank on; the found ones have intervals off zero."""
    own = {f"m{n}": OwnMetric(direction="increase", relative=False) for n in range(12)}
    rng = np.random.default_rng(23)
    rows = [
        Observation(
            unit=f"u{n}", arm=("base", "new")[n % 2], propensity=0.5, time_s=float(n),
            values={f"m{k}": float(rng.normal(0.25 * (k < 6) * (n % 2), 1)) for k in range(12)},
        )
        for n in range(1200)
    ]  # fmt: skip
    found = {}
    for correction in ("bonferroni", "benjamini-hochberg"):
        running = experiment(metrics=own, secondary=tuple(own), correction=correction)
        seen = Observations.from_rows(rows, arms=arm_names(running))
        found[correction] = analyse(running, seen).secondary
    running = experiment(metrics=own, secondary=("m0",))
    raw = sorted(
        analyse(experiment(metrics=own, secondary=(name,)), seen).secondary[0].p for name in own
    )
    adjusted = [min(12 * p / (k + 1) for k, p in list(enumerate(raw))[i:]) for i in range(12)]
    assert sorted(one.p for one in found["benjamini-hochberg"]) == pytest.approx(adjusted)
    wins = {name: sum(one.better is True for one in all_) for name, all_ in found.items()}
    assert wins["benjamini-hochberg"] >= wins["bonferroni"]
    for one in found["benjamini-hochberg"]:
        assert (one.better is not None) == (one.p <= 0.05)
        assert (one.better is None) or not one.low <= 0 <= one.high
