"""The replay harness: a fair optimum, fair baselines, and a controller that comes close."""

from dataclasses import replace

import numpy as np
import pytest

from policies.base import ModelFacts
from policies.carbon.grid import StaticGrid
from policies.carbon.settings import CarbonSettings
from policies.errors import LawError, OutcomesError
from policies.footprint import Rates
from policies.outcomes import Outcome
from tests.bench.gar import Floor, rivals
from tests.bench.replay.days import (
    Burst,
    Workload,
    adversarial,
    day_costs,
    draw_day,
    ordinary,
    rates_at,
    simulate_arrivals,
    simulate_lengths,
    solar_day,
    target_between,
    workload_of,
)
from tests.bench.replay.replay import CONTROLLER, OPTIMUM, draw, offline_optimum, replay_day

CARBON = CarbonSettings.model_validate({"zone": "DE"})
PRICE = Rates(usd_per_input_token=1e-6, usd_per_output_token=1e-6)
MODELS = {
    name: ModelFacts(name=name, parameters=size, rates=PRICE)
    for name, size in (("small", 10**8), ("middle", 4 * 10**8), ("large", 2 * 10**9))
}


def made_up_workload(num_queries=400, seed=1):
    """Return queries of varying difficulty; predictions are noisy, larger models better."""
    rng = np.random.default_rng(seed)
    difficulty = rng.uniform(0, 1, size=(num_queries, 1))
    strength = np.array([[0.45, 0.7, 0.95]])
    chance = 1 / (1 + np.exp(8 * (difficulty - strength)))
    return Workload(
        models=MODELS,
        carbon=CARBON,
        prompt_tokens_Q=rng.integers(10, 200, size=num_queries).astype(float),
        output_tokens_QM=simulate_lengths(num_queries, 3, mean_tokens=100, rng=rng),
        predicted_QM=np.clip(chance + rng.normal(0, 0.1, size=chance.shape), 0, 1),
        actual_QM=(rng.random(chance.shape) < chance).astype(float),
    )


@pytest.fixture(scope="module")
def replayed():
    """Replay one ordinary day of 1,000 requests (seed 3)."""
    workload = made_up_workload()
    usual = ordinary(workload, num_requests=1000, mean_gco2e_per_kwh=380.0, seed=3)
    target = target_between(workload, usual.day, "gco2e", share=0.3)
    return replay_day(workload, usual.day, target, yesterday=usual.yesterday)


def test_the_controller_holds_the_target_near_the_optimum(replayed):
    """A day of a thousand requests: within 2% of the target, at least 97% of the best quality."""
    controller = replayed.of(CONTROLLER)
    assert controller.spent_share == pytest.approx(1.0, abs=0.02)
    assert controller.quality_share >= 0.97


def test_the_controller_beats_thinning_and_greed(replayed):
    """At no more than their spending it is better than a coin or first come, first served."""
    controller = replayed.of(CONTROLLER)
    for name in ("uniform thinning", "greedy until exhausted"):
        assert controller.predicted_quality > replayed.of(name).predicted_quality + 0.02


def test_no_strategy_beats_the_optimum_within_the_budget(replayed):
    """The linear program spends the whole budget, and is better than all who spend no more."""
    optimum = replayed.of(OPTIMUM)
    assert optimum.spent_share == pytest.approx(1.0, abs=1e-6)
    for result in replayed.results:
        if result.spent_share <= 1:
            assert result.predicted_quality <= optimum.predicted_quality + 1e-9


def test_hours_add_up_to_the_day(replayed):
    """Spending and traffic by the hour sum to the day's."""
    assert replayed.requests_H.sum() == replayed.num_requests
    for result in replayed.results:
        assert result.spent_H.sum() == pytest.approx(result.spent_share * replayed.budget)


def test_a_replayed_day_is_drawn(replayed, tmp_path):
    """The plot is a PNG file."""
    draw(replayed, tmp_path / "day.png")
    assert (tmp_path / "day.png").read_bytes().startswith(b"\x89PNG")


def test_adversity_is_what_it_says():
    """Nothing known beforehand, ten times the noon traffic, a dirtier grid, a model gone."""
    workload = made_up_workload()
    cold, burst, step, outage = adversarial(
        workload, num_requests=1000, mean_gco2e_per_kwh=380.0, seed=3
    )
    assert not cold.learned
    noon = np.sum(((burst.day.times_s % 86400) // 3600) == 12)
    usual = np.sum(((cold.day.times_s % 86400) // 3600) == 12)
    assert noon > 6 * usual
    day_s = 86400.0
    assert step.day.grid.at(day_s + 13 * 3600).gco2e_per_kwh == pytest.approx(
        2 * cold.day.grid.at(day_s + 13 * 3600).gco2e_per_kwh
    )
    hours = (outage.day.times_s % 86400) / 3600
    gone = ~outage.day.available_NM
    assert gone.any(axis=0).sum() == 1
    assert set(np.flatnonzero(gone.any(axis=1))) == set(
        np.flatnonzero((hours >= 10) & (hours < 16))
    )


def test_a_model_that_is_gone_is_not_asked():
    """Through an outage every strategy answers with what is up, the target still holds."""
    workload = made_up_workload()
    outage = adversarial(workload, num_requests=1000, mean_gco2e_per_kwh=380.0, seed=3)[3]
    target = target_between(workload, outage.day, "gco2e", share=0.3)
    replayed = replay_day(workload, outage.day, target, yesterday=outage.yesterday)
    # Asking an absent model would have made the optimum, which may not, the worse one.
    assert replayed.of(CONTROLLER).quality_share <= 1.0
    assert replayed.of(CONTROLLER).spent_share == pytest.approx(1.0, abs=0.03)


def test_the_optimum_solves_a_case_done_by_hand():
    """Two requests, one upgrade affordable: it goes where it gains more."""
    qualities = np.array([[0.5, 0.6], [0.5, 0.9]])
    costs = np.array([[1.0, 2.0], [1.0, 2.0]])
    up = np.ones((2, 2), dtype=bool)
    shares = offline_optimum(qualities, costs, up, budget=3.0)
    assert shares == pytest.approx(np.array([[1.0, 0.0], [0.0, 1.0]]))
    with pytest.raises(LawError, match="no assignment keeps the budget"):
        offline_optimum(qualities, costs, up, budget=1.0)


def test_costs_are_those_of_the_models_rates():
    """The vectorised costs equal each model's footprint at the day's intensity."""
    workload = made_up_workload()
    rng = np.random.default_rng(0)
    day = draw_day(workload, np.array([10.0, 20.0]), StaticGrid.of_zone("DE"), rng)
    costs = day_costs(workload, day, "gco2e")
    rates = rates_at(workload, 380.9)
    for row, query in enumerate(day.queries):
        for column, name in enumerate(workload.names):
            expected = rates[name].footprint(
                int(workload.prompt_tokens_Q[query]), int(workload.output_tokens_QM[query, column])
            )
            assert costs[row, column] == pytest.approx(expected.gco2e)


def test_arrivals_have_a_rhythm_and_bursts():
    """About as many as asked for, sorted within the day, few at night, many in a burst (seed 4)."""
    rng = np.random.default_rng(4)
    times_s = simulate_arrivals(20_000, rng=rng, num_bursts=0)
    assert len(times_s) == pytest.approx(20_000, rel=0.03)
    assert (np.diff(times_s) >= 0).all()
    assert 0 <= times_s[0] < times_s[-1] < 86_400
    per_hour = np.bincount((times_s // 3600).astype(int), minlength=24)
    assert per_hour[10] > 3 * per_hour[3]
    burst = (Burst(start_s=3 * 3600, length_s=3600, factor=10.0),)
    bursty = simulate_arrivals(20_000, rng=np.random.default_rng(4), num_bursts=0, bursts=burst)
    assert np.sum((bursty // 3600) == 3) > 8 * per_hour[3]


def test_the_simulated_grid_has_the_mean_asked_for():
    """Clean at midday, dirty in the evening, the zone's mean over the day."""
    values = dict(solar_day(300.0))
    assert np.mean(list(values.values())) == pytest.approx(300.0)
    assert values[13.0] < 0.7 * 300 < 1.2 * 300 < values[20.0]


def test_a_workload_is_made_of_outcomes():
    """Lengths come from the outcomes where they have them; incomplete queries are left out."""
    words = ("add", "sort", "name", "spell", "count")
    outcomes = [
        Outcome(
            query=f"{words[n % 5]} the numbers {n} and {n + 1}",
            scores={"small": float(n % 5 == 0), "middle": float(n % 5 < 3), "large": 1.0},
            prompt_tokens=7,
            output_tokens={"small": 3, "middle": 4, "large": 5},
        )
        for n in range(60)
    ]
    outcomes.append(Outcome(query="only one knows", scores={"small": 1.0}))
    workload = workload_of(outcomes, MODELS, CARBON)
    assert workload.predicted_QM.shape == (60, 3)
    assert (workload.prompt_tokens_Q == 7).all()
    assert (workload.output_tokens_QM == np.array([3, 4, 5])).all()
    # Cross-fitted predictions still tell the tasks that the small model can do.
    easy = workload.actual_QM[:, 0] == 1
    assert workload.predicted_QM[easy, 0].mean() > workload.predicted_QM[~easy, 0].mean() + 0.3
    with pytest.raises(OutcomesError, match="no query has scores for all of small, middle"):
        workload_of(outcomes[-1:], MODELS, CARBON)
    # A model that was hardly asked takes no part, instead of leaving hardly a query.
    seldom = [
        one
        if row < 15
        else replace(one, scores={k: v for k, v in one.scores.items() if k != "large"})
        for row, one in enumerate(outcomes)
    ]
    assert list(workload_of(seldom, MODELS, CARBON).models) == ["small", "middle"]


def test_targets_lie_between_the_cheapest_and_the_best():
    """Share 0 is the cheapest model's spending, share 1 the best predicted one's."""
    workload = made_up_workload()
    usual = ordinary(workload, num_requests=300, mean_gco2e_per_kwh=380.0, seed=3)
    low, high = (
        target_between(workload, usual.day, "gco2e", share=share).amount for share in (0.0, 1.0)
    )
    middle = target_between(workload, usual.day, "gco2e", share=0.5)
    assert (middle.resource, middle.per) == ("gco2e", "hour")
    assert middle.amount == pytest.approx((low + high) / 2)
    assert low < high


def test_rivals_are_judged_on_the_same_day():
    """GAR keeps its floor on yesterday's budget, and its price reacts to what is spent (seed 3)."""
    workload = made_up_workload()
    usual = ordinary(workload, num_requests=1000, mean_gco2e_per_kwh=380.0, seed=3)
    target = target_between(workload, usual.day, "gco2e", share=0.3)
    found = replay_day(workload, usual.day, target, yesterday=usual.yesterday, rivals=rivals)
    names = [result.name for result in found.results]
    assert names[-2:] == ["GAR, floor", "GAR-PD"]
    for name in names[-2:]:
        assert 0.5 < found.of(name).spent_share < 1.6
        assert found.of(name).quality_share < 1.02 * max(1.0, found.of(name).spent_share)
    floor = Floor(workload, usual.day, usual.yesterday, target)
    chosen = np.array([floor.choose(index) for index in range(len(usual.day))])
    rows = np.arange(len(chosen))
    reached = floor.scores[rows, chosen] >= floor.floor
    assert (reached | (floor.scores.max(axis=1) < floor.floor)).all()
    cheaper = floor.estimates < floor.estimates[rows, chosen][:, None]
    assert not (cheaper & (floor.scores >= floor.floor) & reached[:, None]).any()
