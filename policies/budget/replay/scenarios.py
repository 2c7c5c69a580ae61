"""Days to replay: an ordinary one, and the ones that break budget controllers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from policies.base import ModelFacts
from policies.budget.replay.scene import (
    Day,
    Scene,
    cross_fitted_predictions,
    day_costs,
    draw_day,
    simulate_lengths,
)
from policies.budget.replay.traffic import DAY_S, Burst, simulate_arrivals, solar_day
from policies.budget.targets import Resource, Target
from policies.carbon.grid import GridIntensity, ScheduledGrid
from policies.carbon.settings import CarbonSettings
from policies.errors import OutcomesError
from policies.outcomes import Outcome, score_table

# Where a data set does not say: characters per token of English, and a mean answer.
_CHARACTERS_PER_TOKEN = 4
_MEAN_OUTPUT_TOKENS = 200


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A day, the day before it, and whether the controller lived through that one."""

    name: str
    yesterday: Day
    day: Day
    learned: bool = True


def scene_of(
    outcomes: Sequence[Outcome],
    models: Mapping[str, ModelFacts],
    carbon: CarbonSettings,
    *,
    seed: int = 0,
) -> Scene:
    """Return the scene of queries that every model in `models` has answered.

    Predictions are cross-fitted on the same outcomes. Token counts are the outcomes' where they
    have them; prompt lengths are otherwise guessed from the text and answer lengths simulated.
    Raises `OutcomesError` if no query has a score for every model.
    """
    names = tuple(models)
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
    return Scene(
        models=dict(models),
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


def target_between(scene: Scene, day: Day, resource: Resource, *, share: float) -> Target:
    """Return the hourly target that lies at `share` between the cheapest and the best.

    0 pays for the cheapest model for every request of `day`, 1 for the best predicted one.
    """
    costs = day_costs(scene, day, resource)
    rows = np.arange(len(day))
    best = costs[rows, scene.predicted_QM[day.queries].argmax(axis=1)].sum()
    cheapest = costs[rows, day_costs(scene, day, resource, estimated=True).argmin(axis=1)].sum()
    return Target(resource=resource, amount=float(cheapest + share * (best - cheapest)) / 24)


def ordinary(scene: Scene, *, num_requests: int, mean_gco2e_per_kwh: float, seed: int) -> Scenario:
    """Return an ordinary day after another one with the same rhythm and other bursts."""
    grid = _grid(solar_day(mean_gco2e_per_kwh))
    yesterday, day = (
        _day(scene, grid, number, num_requests=num_requests, seed=seed) for number in (0, 1)
    )
    return Scenario(name="ordinary day", yesterday=yesterday, day=day)


def adversarial(
    scene: Scene, *, num_requests: int, mean_gco2e_per_kwh: float, seed: int
) -> tuple[Scenario, ...]:
    """Return the same day with, in turn, one thing going wrong that nobody announced.

    A cold start; ten times the traffic for an hour at noon; a grid twice as dirty from noon on; the
    model that answers most requests gone from 10 to 16 h.
    """
    base = ordinary(
        scene, num_requests=num_requests, mean_gco2e_per_kwh=mean_gco2e_per_kwh, seed=seed
    )
    burst = _day(
        scene,
        base.day.grid,
        1,
        num_requests=num_requests,
        seed=seed,
        bursts=(Burst(start_s=12 * 3600, length_s=3600, factor=10.0),),
    )
    profile = solar_day(mean_gco2e_per_kwh)
    step = _grid([(hour, value * (2 if hour >= 12 else 1)) for hour, value in profile])
    predicted = scene.predicted_QM[base.day.queries]
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
            name=f"{scene.names[favourite]} gone, 10 to 16 h",
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
    scene: Scene,
    grid: GridIntensity,
    number: int,
    *,
    num_requests: int,
    seed: int,
    bursts: tuple[Burst, ...] = (),
) -> Day:
    rng = np.random.default_rng([seed, number])
    times_s: NDArray[np.float64] = simulate_arrivals(num_requests, rng=rng, bursts=bursts)
    return draw_day(scene, times_s + number * DAY_S, grid, rng)
