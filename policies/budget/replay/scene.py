"""What a replay plays with: queries with real outcomes, predictions of them, and a day."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.base import ModelFacts
from policies.budget.targets import Resource
from policies.carbon.grid import GridIntensity
from policies.carbon.settings import CarbonSettings
from policies.footprint import Rates


@dataclass(frozen=True, kw_only=True)
class Scene:
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
    scene: Scene, times_s: NDArray[np.float64], grid: GridIntensity, rng: np.random.Generator
) -> Day:
    """Return a day on which each request is a random query and every model is up."""
    queries = rng.integers(len(scene.prompt_tokens_Q), size=len(times_s))
    return Day(
        times_s=times_s,
        queries=queries,
        available_NM=np.ones((len(times_s), len(scene.models)), dtype=np.bool_),
        grid=grid,
    )


def rates_at(scene: Scene, gco2e_per_kwh: float) -> dict[str, Rates]:
    """Return the models' rates at an intensity; all run on the default hardware."""
    return scene.carbon.rates(
        scene.models, dict.fromkeys(scene.models, ""), gco2e_per_kwh=gco2e_per_kwh
    )


def day_costs(
    scene: Scene, day: Day, resource: Resource, *, estimated: bool = False
) -> NDArray[np.float64]:
    """Return [N, M]: what each request would really cost with each model.

    `estimated` takes each model's mean answer length instead of the real one, which is what can be
    known beforehand.
    """
    prompt = scene.prompt_tokens_Q[day.queries]
    output = scene.output_tokens_QM[day.queries]
    if estimated:
        output = np.broadcast_to(scene.output_tokens_QM.mean(axis=0), output.shape)
    intensity = np.array([day.grid.at(now_s).gco2e_per_kwh for now_s in day.times_s])
    # Costs are linear in tokens and carbon in intensity: two intensities give both coefficients.
    zero, one = (_coefficients(scene, value, resource) for value in (0.0, 1.0))
    per_prompt = zero[0] + np.outer(intensity, one[0] - zero[0])
    per_output = zero[1] + np.outer(intensity, one[1] - zero[1])
    return per_prompt * prompt[:, None] + per_output * output


def _coefficients(
    scene: Scene, gco2e_per_kwh: float, resource: Resource
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rates = rates_at(scene, gco2e_per_kwh)
    return (
        np.array([getattr(rates[name].footprint(1, 0), resource) for name in scene.names]),
        np.array([getattr(rates[name].footprint(0, 1), resource) for name in scene.names]),
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
    texts: Sequence[str], scores_QM: NDArray[np.float64], *, num_folds: int = 5, seed: int = 0
) -> NDArray[np.float64]:
    """Return [Q, M] predicted scores, each from a model that never saw its query.

    TF-IDF of words and character n-grams into ridge regression: a plain router, as a stand-in for
    whatever policy is deployed.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # noqa: PLC0415 - heavy
    from sklearn.linear_model import Ridge  # noqa: PLC0415
    from sklearn.model_selection import KFold  # noqa: PLC0415

    predicted = np.zeros_like(scores_QM)
    array = np.array(texts, dtype=object)
    for train, test in KFold(num_folds, shuffle=True, random_state=seed).split(array):
        encoder = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        features = encoder.fit_transform(array[train])
        head = Ridge(alpha=3.0, random_state=seed, solver="lsqr")
        head.fit(features, scores_QM[train])
        predicted[test] = head.predict(encoder.transform(array[test])).reshape(len(test), -1)
    return np.clip(predicted, 0.0, 1.0)
