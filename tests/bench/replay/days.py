"""Days to replay: who asks when, under what grid; an ordinary day, and those that go wrong.

Real are a workload's queries, scores and prices; arrivals and the grid's rhythm are simulated, and
answer lengths where the outcomes have none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from policies.base import ModelFacts
from policies.budget.prices import BudgetTarget, Resource
from policies.carbon.grid import GridIntensity, ScheduledGrid
from policies.carbon.settings import CarbonSettings
from policies.errors import OutcomesError
from policies.footprint import Rates
from policies.outcomes import Outcome, score_table

DAY_S = 86_400.0
_STEP_S = 60.0
# Where a data set does not say: characters per token of English, and a mean answer.
_CHARACTERS_PER_TOKEN = 4
_MEAN_OUTPUT_TOKENS = 200


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Q queries that M models have answered.

    `predicted_QM` is what the router believes (cross-fitted: no query was in the training of its
    own prediction), `actual_QM` how good the answers were, both in [0, 1]. `carbon` says what
    hardware runs the models.
    """

    models: Mapping[str, ModelFacts]
    carbon: CarbonSettings
    prompt_tokens_Q: NDArray[np.float64]
    output_tokens_QM: NDArray[np.float64]
    predicted_QM: NDArray[np.float64]
    actual_QM: NDArray[np.float64]

    @property
    def names(self) -> tuple[str, ...]:
        """The models, in the order of the arrays' columns."""
        return tuple(self.models)


@dataclass(frozen=True, kw_only=True)
class Day:
    """N requests: when they come (Unix seconds), which query each is, and what is up.

    `available_NM` is False where a model could not answer. `grid` gives the intensity.
    """

    times_s: NDArray[np.float64]
    queries: NDArray[np.int_]
    available_NM: NDArray[np.bool_]
    grid: GridIntensity

    def __len__(self) -> int:
        return len(self.times_s)


def draw_day(
    workload: Workload, times_s: NDArray[np.float64], grid: GridIntensity, rng: np.random.Generator
) -> Day:
    """Return a day on which each request is a random query and every model is up."""
    queries = rng.integers(len(workload.prompt_tokens_Q), size=len(times_s))
    return Day(
        times_s=times_s,
        queries=queries,
        available_NM=np.ones((len(times_s), len(workload.models)), dtype=np.bool_),
        grid=grid,
    )


def rates_at(workload: Workload, gco2e_per_kwh: float) -> dict[str, Rates]:
    """Return the models' rates at an intensity; all run on the default hardware."""
    return workload.carbon.rates(
        workload.models, dict.fromkeys(workload.models, ""), gco2e_per_kwh=gco2e_per_kwh
    )


def day_costs(
    workload: Workload, day: Day, resource: Resource, *, estimated: bool = False
) -> NDArray[np.float64]:
    """Return [N, M]: what each request would really cost with each model.

    `estimated` takes each model's mean answer length instead of the real one, which is what can be
    known beforehand.
    """
    prompt = workload.prompt_tokens_Q[day.queries]
    output = workload.output_tokens_QM[day.queries]
    if estimated:
        output = np.broadcast_to(workload.output_tokens_QM.mean(axis=0), output.shape)
    intensity = np.array([day.grid.at(now_s).gco2e_per_kwh for now_s in day.times_s])
    # Costs are linear in tokens and carbon in intensity: two intensities give both coefficients.
    zero, one = (_coefficients(workload, value, resource) for value in (0.0, 1.0))
    per_prompt = zero[0] + np.outer(intensity, one[0] - zero[0])
    per_output = zero[1] + np.outer(intensity, one[1] - zero[1])
    return per_prompt * prompt[:, None] + per_output * output


def _coefficients(
    workload: Workload, gco2e_per_kwh: float, resource: Resource
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rates = rates_at(workload, gco2e_per_kwh)
    return (
        np.array([getattr(rates[name].footprint(1, 0), resource) for name in workload.names]),
        np.array([getattr(rates[name].footprint(0, 1), resource) for name in workload.names]),
    )


def simulate_lengths(
    num_queries: int, num_models: int, *, mean_tokens: float, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Return made-up answer lengths [Q, M] where a data set has none.

    Log-normal per query (σ = 0.6) around `mean_tokens`, with each model 0.7 to 1.4 times as wordy;
    what a controller cannot know beforehand.
    """
    per_query = rng.lognormal(-0.18, 0.6, size=(num_queries, 1))
    wordiness = rng.uniform(0.7, 1.4, size=(1, num_models))
    return np.maximum(1.0, np.round(mean_tokens * per_query * wordiness))


def cross_fitted_predictions(
    texts: Sequence[str], scores_QM: NDArray[np.float64], *, seed: int = 0
) -> NDArray[np.float64]:
    """Return [Q, M] predicted scores, each from a model that never saw its query.

    TF-IDF of words and character n-grams into ridge regression: a plain router, as a stand-in for
    whatever policy is deployed.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import KFold

    predicted = np.zeros_like(scores_QM)
    array = np.array(texts, dtype=object)
    for train, test in KFold(5, shuffle=True, random_state=seed).split(array):
        encoder = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        features = encoder.fit_transform(array[train])
        head = Ridge(alpha=3.0, random_state=seed, solver="lsqr")
        head.fit(features, scores_QM[train])
        predicted[test] = head.predict(encoder.transform(array[test])).reshape(len(test), -1)
    return np.clip(predicted, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A day, the day before it, and whether the controller lived through that one."""

    name: str
    yesterday: Day
    day: Day
    learned: bool = True


def workload_of(
    outcomes: Sequence[Outcome],
    models: Mapping[str, ModelFacts],
    carbon: CarbonSettings,
    *,
    seed: int = 0,
) -> Workload:
    """Return the workload of queries that every model in `models` has answered.

    Models that were asked less than half as much as others are left out. Predictions are
    cross-fitted on the same outcomes. Token counts are the outcomes' where they have them; prompt
    lengths are otherwise guessed from the text and answer lengths simulated. Raises `OutcomesError`
    if no query has a score for every model.
    """
    asked = {name: sum(name in outcome.scores for outcome in outcomes) for name in models}
    often = tuple(name for name, count in asked.items() if 2 * count >= max(asked.values()))
    names = often if len(often) > 1 else tuple(models)
    complete = [outcome for outcome in outcomes if set(names) <= set(outcome.scores)]
    if not complete:
        raise OutcomesError(f"no query has scores for all of {', '.join(names)}")
    table = score_table(complete, names)
    lengths = simulate_lengths(
        len(complete),
        len(names),
        mean_tokens=_MEAN_OUTPUT_TOKENS,
        rng=np.random.default_rng(seed),
    )
    for row, outcome in enumerate(complete):
        for column, name in enumerate(names):
            lengths[row, column] = outcome.output_tokens.get(name, lengths[row, column])
    return Workload(
        models={name: models[name] for name in names},
        carbon=carbon,
        prompt_tokens_Q=np.array(
            [
                outcome.prompt_tokens
                if outcome.prompt_tokens is not None
                else max(1, len(outcome.query) // _CHARACTERS_PER_TOKEN)
                for outcome in complete
            ],
            dtype=np.float64,
        ),
        output_tokens_QM=lengths,
        predicted_QM=cross_fitted_predictions(
            [outcome.query for outcome in complete], table.scores_QM, seed=seed
        ),
        actual_QM=table.scores_QM,
    )


def target_between(
    workload: Workload, day: Day, resource: Resource, *, share: float
) -> BudgetTarget:
    """Return the hourly target that lies at `share` between the cheapest and the best.

    0 pays for the cheapest model for every request of `day`, 1 for the best predicted one.
    """
    costs = day_costs(workload, day, resource)
    rows = np.arange(len(day))
    best = costs[rows, workload.predicted_QM[day.queries].argmax(axis=1)].sum()
    cheapest = costs[rows, day_costs(workload, day, resource, estimated=True).argmin(axis=1)].sum()
    return BudgetTarget(resource=resource, amount=float(cheapest + share * (best - cheapest)) / 24)


def ordinary(
    workload: Workload, *, num_requests: int, mean_gco2e_per_kwh: float, seed: int
) -> Scenario:
    """Return an ordinary day after another one with the same rhythm and other bursts."""
    grid = _grid(solar_day(mean_gco2e_per_kwh))
    yesterday, day = (
        _day(workload, grid, number, num_requests=num_requests, seed=seed) for number in (0, 1)
    )
    return Scenario(name="ordinary day", yesterday=yesterday, day=day)


def adversarial(
    workload: Workload, *, num_requests: int, mean_gco2e_per_kwh: float, seed: int
) -> tuple[Scenario, ...]:
    """Return the same day with, in turn, one thing going wrong that nobody announced.

    A cold start; ten times the traffic for an hour at noon; a grid twice as dirty from noon on; the
    model that answers most requests gone from 10 to 16 h.
    """
    base = ordinary(
        workload, num_requests=num_requests, mean_gco2e_per_kwh=mean_gco2e_per_kwh, seed=seed
    )
    burst = _day(
        workload,
        base.day.grid,
        1,
        num_requests=num_requests,
        seed=seed,
        bursts=(Burst(start_s=12 * 3600, length_s=3600, factor=10.0),),
    )
    profile = solar_day(mean_gco2e_per_kwh)
    step = _grid([(hour, value * (2 if hour >= 12 else 1)) for hour, value in profile])
    predicted = workload.predicted_QM[base.day.queries]
    favourite = np.bincount(predicted.argmax(axis=1)).argmax()
    hours = (base.day.times_s % DAY_S) / 3600
    available = base.day.available_NM.copy()
    available[(hours >= 10) & (hours < 16), favourite] = False
    return (
        replace(base, name="cold start", learned=False),
        replace(base, name="ten-fold burst at noon", day=burst),
        replace(base, name="grid twice as dirty from noon", day=replace(base.day, grid=step)),
        replace(
            base,
            name=f"{workload.names[favourite]} gone, 10 to 16 h",
            day=replace(base.day, available_NM=available),
        ),
    )


def _grid(profile: Sequence[tuple[float, float]]) -> ScheduledGrid:
    return ScheduledGrid(
        [hour * 3600 for hour, _ in profile],
        [value for _, value in profile],
        source="simulated",
        daily=True,
    )


def _day(
    workload: Workload,
    grid: GridIntensity,
    number: int,
    *,
    num_requests: int,
    seed: int,
    bursts: tuple[Burst, ...] = (),
) -> Day:
    rng = np.random.default_rng([seed, number])
    times_s: NDArray[np.float64] = simulate_arrivals(num_requests, rng=rng, bursts=bursts)
    return draw_day(workload, times_s + number * DAY_S, grid, rng)


@dataclass(frozen=True, kw_only=True)
class Burst:
    """From `start_s` for `length_s` seconds, `factor` times the traffic."""

    start_s: float
    length_s: float
    factor: float


def simulate_arrivals(
    num_requests: int,
    *,
    rng: np.random.Generator,
    num_bursts: int = 6,
    bursts: tuple[Burst, ...] = (),
) -> NDArray[np.float64]:
    """Return the seconds of about `num_requests` arrivals of one day, ascending.

    An inhomogeneous Poisson process: quiet nights, two daily peaks (10 and 20 h), and `num_bursts`
    random bursts of 5 to 20 minutes at 2 to 6 times the traffic. `bursts` come on top of
    `num_requests`.
    """
    steps_s = np.arange(0, DAY_S, _STEP_S)
    hours = steps_s / 3600
    rate = 0.25 + np.exp(-(((hours - 10) / 3.0) ** 2)) + 0.8 * np.exp(-(((hours - 20) / 2.5) ** 2))
    for _ in range(num_bursts):
        start_s = rng.uniform(0, DAY_S)
        length_s = rng.uniform(300, 1200)
        rate[(steps_s >= start_s) & (steps_s < start_s + length_s)] *= rng.uniform(2, 6)
    rate *= num_requests / rate.sum()
    for burst in bursts:
        inside = (steps_s >= burst.start_s) & (steps_s < burst.start_s + burst.length_s)
        rate[inside] *= burst.factor
    counts = rng.poisson(rate)
    return np.sort(np.repeat(steps_s, counts) + rng.uniform(0, _STEP_S, size=int(counts.sum())))


def solar_day(mean_gco2e_per_kwh: float) -> tuple[tuple[float, float], ...]:
    """Return (hour, gCO2e per kWh) of a made-up grid: clean at midday, dirty in the evening.

    Between about half and 1.4 times the mean; hourly values.
    """
    shape = [
        1.0
        - 0.45 * math.exp(-(((hour - 13) / 3.0) ** 2))
        + 0.4 * math.exp(-(((hour - 20) / 2.0) ** 2))
        for hour in range(24)
    ]
    scale = mean_gco2e_per_kwh * 24 / sum(shape)
    return tuple((float(hour), scale * value) for hour, value in enumerate(shape))
