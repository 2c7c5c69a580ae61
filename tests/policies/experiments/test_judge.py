"""A judge shrinks the intervals of what people say, and cannot bias them (simulated)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom

from policies.errors import ExperimentError
from policies.experiments.analysis import analyse
from policies.experiments.effects import Observations, arm_mean
from policies.experiments.experiment import Experiment
from policies.experiments.metrics import Goal
from tests.bench.experiments_simulated import coverage, judged, judged_experiment


def drawn(seed: int, num: int = 4000, **changes: float) -> Observations:
    """Return answers of which a fifth is rated, by a judge who likes the treatment."""
    options = {"lift": 0.0, "skill": 0.9, "bias": 0.1, "share": 0.2, **changes}
    return judged(num, **options, rng=np.random.default_rng(seed))


def test_one_mean_is_that_of_the_paper() -> None:
    """PPI++ for a mean (Angelopoulos, Duchi & Zrnic 2023), computed from its own formulas (seed 3).

    The paper's samples are disjoint: n rated answers and N others; its power is tuned in closed
    form. Ours is the same up to terms of order 1/n.
    """
    seen = drawn(3, num=20_000)
    here = seen.arm == 0
    rated = ~np.isnan(seen.columns["quality"][here])
    y, f = seen.columns["quality"][here][rated], seen.columns["grade"][here]
    n, big_n = rated.sum(), (~rated).sum()
    power = np.cov(y, f[rated])[0, 1] / ((1 + n / big_n) * f.var(ddof=1))
    mean = y.mean() + power * (f[~rated].mean() - f[rated].mean())
    se = np.sqrt((y - power * f[rated]).var(ddof=1) / n + power**2 * f[~rated].var(ddof=1) / big_n)
    found = arm_mean(seen.sums("control", "quality", judge="grade"))
    assert found.mean == pytest.approx(mean, abs=0.05 * se)
    assert found.se == pytest.approx(se, rel=0.01)
    assert found.num_units == n
    assert found.se < 0.8 * arm_mean(seen.sums("control", "quality")).se


def test_a_judge_who_likes_one_arm_misleads_alone_and_helps_beside_people() -> None:
    """With arms that are alike the judge alone is surely wrong; both are right, and narrower.

    60 trials with a look after every 200 answers per arm: at most 5% may miss zero at any look
    (seeds 0 to 59).
    """
    trials = [drawn(seed) for seed in range(60)]
    alone = [coverage("grade", seen, 0.0, every=200) for seen in trials[:20]]
    people = [coverage("quality", seen, 0.0, every=200) for seen in trials]
    both = [coverage("judged_quality", seen, 0.0, every=200) for seen in trials]
    assert not any(held for _, _, held in alone)
    most = binom.ppf(0.999, len(trials), 0.05)
    assert sum(not held for _, _, held in both) <= most
    assert np.mean([width for _, width, _ in both]) < 0.8 * np.mean([w for _, w, _ in people])
    spread = np.std([estimate for estimate, _, _ in both])
    assert abs(np.mean([e for e, _, _ in both])) < 4 * spread / np.sqrt(len(trials))


def test_a_judge_without_skill_costs_nothing() -> None:
    """One who tosses a coin leaves people's interval as it was (seed 5)."""
    seen = drawn(5, skill=0.0, bias=0.0)
    widths = [coverage(m, seen, 0.0, every=500)[1] for m in ("judged_quality", "quality")]
    assert widths[0] == pytest.approx(widths[1], rel=0.01)


def test_the_report_says_when_people_choose_what_they_rate() -> None:
    """Where only what went wrong is rated, the judge sees it (seed 6)."""
    seen = drawn(6)
    experiment = judged_experiment("judged_quality")
    assert not analyse(experiment, seen).notes
    quality = seen.columns["quality"]
    rng = np.random.default_rng(6)
    kept = (quality == 0) | (rng.random(len(quality)) < 0.3)
    chosen = replace(seen, columns={**seen.columns, "quality": np.where(kept, quality, np.nan)})
    notes = analyse(experiment, chosen).notes
    assert sum("what people rate depends on the answer" in note for note in notes) == 2


def test_it_needs_a_judge() -> None:
    """Metrics of a judge are unknown to an experiment without one."""
    arms = judged_experiment("grade").arms
    with pytest.raises(ExperimentError, match=r"primary\.metric: 'judged_quality' is unknown"):
        Experiment(name="e", arms=arms, primary=Goal(metric="judged_quality"))
