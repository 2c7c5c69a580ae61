"""Routers against plain rivals under every protocol: train on its training parts, test on the rest.

Rivals predict scores [Q, M] for the test queries. Oracles look at the test scores; no router can,
and they say how much there is to gain.

Shape legend: Q queries, M models, W words and word pairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import scipy.sparse as sp
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold, KFold
from sklearn.naive_bayes import ComplementNB

from policies.encoders.base import Encoder
from policies.errors import OutcomesError
from policies.evaluation.judge import Report, judge, median_decision_us
from policies.outcome_sets import near_duplicates
from policies.outcomes import Outcome, score_table
from policies.routing.fit import FitSettings, fit_router

Floats = NDArray[np.float64]
Protocol: TypeAlias = Literal["folds", "tasks", "split"]

NUM_FOLDS = 5
NUM_NEIGHBOURS = 100

DRAWN = ("random", "TF-IDF + ridge", "Clusters", "Learned", "dataset oracle")
"""The methods whose names begin so are in the plots."""


def folds(
    outcomes: Sequence[Outcome],
    protocol: Protocol,
    *,
    train: str = "train",
    test: str = "test",
    seed: int = 0,
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield pairs of training and test rows.

    "folds" are five random parts, each tested once; "tasks" keeps every task (first tag) whole, so
    that a tested task was never trained on; "split" trains on the outcomes' split `train` and
    tests on `test`. Raises `OutcomesError` where the outcomes lack the tags or splits.
    """
    rows = np.arange(len(outcomes))
    if protocol == "split":
        parts = [
            [row for row, outcome in enumerate(outcomes) if outcome.split == split]
            for split in (train, test)
        ]
        if not all(parts):
            raise OutcomesError(f"these outcomes lack the split {train!r} or {test!r}")
        yield parts[0], parts[1]
    elif protocol == "folds":
        for some, rest in KFold(NUM_FOLDS, shuffle=True, random_state=seed).split(rows):
            yield some.tolist(), rest.tolist()
    else:
        tasks = [outcome.tags[0] if outcome.tags else "" for outcome in outcomes]
        num_tasks = len(set(tasks))
        if num_tasks < 2 or "" in tasks:
            raise OutcomesError("leaving tasks out needs a tag on every outcome, and two tasks")
        for some, rest in GroupKFold(min(NUM_FOLDS, num_tasks)).split(rows, groups=tasks):
            yield some.tolist(), rest.tolist()


@dataclass(frozen=True, kw_only=True)
class Split:
    """Training and test outcomes with the scores [Q, M] of `models`.

    `train_QW` and `test_QW` count the queries' words and word pairs (see `count_words`).
    """

    models: tuple[str, ...]
    train: Sequence[Outcome]
    test: Sequence[Outcome]
    train_QW: sp.csr_matrix
    test_QW: sp.csr_matrix
    seed: int

    def scores(self, outcomes: Sequence[Outcome]) -> Floats:
        """Return the known scores of `outcomes`."""
        return score_table(outcomes, self.models).scores_QM

    @property
    def queries(self) -> list[str]:
        """The test queries' texts."""
        return [outcome.query for outcome in self.test]

    @cached_property
    def tfidf(self) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """Sublinear tf-idf of training and test queries, without what stands in one of them."""
        common = np.flatnonzero(np.bincount(self.train_QW.indices) >= 2)
        weigh = TfidfTransformer(sublinear_tf=True)
        return weigh.fit_transform(self.train_QW[:, common]), weigh.transform(
            self.test_QW[:, common]
        )


def count_words(texts: Sequence[str]) -> sp.csr_matrix:
    """Count words and word pairs, once for all folds: hashing learns nothing from test queries."""
    hasher = HashingVectorizer(
        n_features=1 << 21, ngram_range=(1, 2), norm=None, alternate_sign=False, dtype=np.float32
    )
    counts: sp.csr_matrix = hasher.transform(texts).tocsr()
    return counts


def random_choice(split: Split) -> Floats:
    """Any model, with equal chances."""
    return np.random.default_rng(split.seed).random((len(split.test), len(split.models)))


def best_single(split: Split) -> Floats:
    """Always the model that did best in training."""
    mean_M = np.nanmean(split.scores(split.train), axis=0)
    return np.tile(mean_M, (len(split.test), 1))


def dataset_oracle(split: Split) -> Floats:
    """The model that does best on the query's task, as the test scores tell.

    What a perfect task classifier would reach; only what lies above it is per-query skill.
    """
    return _of_task(_task_means(split, split.test), [_task(o) for o in split.test], split)


def query_oracle(split: Split) -> Floats:
    """The best model for every single query: the ceiling."""
    return split.scores(split.test)


def task_classifier(split: Split) -> Floats:
    """Recognise the task (complement naive Bayes on tf-idf), then use its training means."""
    X, test_X = split.tfidf
    tasks = [_task(outcome) for outcome in split.train]
    if len(set(tasks)) < 2:
        return best_single(split)
    model = ComplementNB().fit(X, tasks)
    found = model.predict(test_X)
    return _of_task(_task_means(split, split.train), [str(task) for task in found], split)


def tfidf_ridge(split: Split) -> Floats:
    """Tf-idf of words and word pairs, ridge regression on every model's scores."""
    X, test_X = split.tfidf
    targets = np.nan_to_num(split.scores(split.train), nan=0.5)
    model = Ridge(alpha=10.0, solver="sparse_cg", tol=1e-2).fit(X, targets)
    predicted: Floats = model.predict(test_X)
    return predicted.reshape(len(split.test), -1)


def nearest_neighbours(split: Split) -> Floats:
    """The mean scores of the hundred training queries that are nearest by tf-idf."""
    X, test_X = split.tfidf
    near_QQ = (test_X @ X.T).toarray()
    num_near = min(NUM_NEIGHBOURS, X.shape[0])
    nearest = np.argpartition(-near_QQ, num_near - 1, axis=1)[:, :num_near]
    known_QM = split.scores(split.train)
    scores_QM = np.where(np.isnan(known_QM), np.nanmean(known_QM, axis=0), known_QM)
    near: Floats = scores_QM[nearest].mean(1)
    return near


BASELINES: Mapping[str, Callable[[Split], Floats]] = {
    "random": random_choice,
    "best single": best_single,
    "task classifier": task_classifier,
    "TF-IDF + ridge": tfidf_ridge,
    "kNN": nearest_neighbours,
}

ORACLES: Mapping[str, Callable[[Split], Floats]] = {
    "dataset oracle": dataset_oracle,
    "per-query oracle": query_oracle,
}


def _task(outcome: Outcome) -> str:
    return outcome.tags[0] if outcome.tags else ""


def _task_means(split: Split, outcomes: Sequence[Outcome]) -> dict[str, Floats]:
    scores_QM = split.scores(outcomes)
    tasks = np.array([_task(outcome) for outcome in outcomes])
    return {str(task): np.nanmean(scores_QM[tasks == task], axis=0) for task in np.unique(tasks)}


def _of_task(means: Mapping[str, Floats], tasks: Sequence[str], split: Split) -> Floats:
    unknown = np.full(len(split.models), 0.5)
    return np.array([means.get(task, unknown) for task in tasks])


def evaluate(
    outcomes: Sequence[Outcome],
    *,
    title: str,
    protocol: Protocol,
    encoders: Mapping[str, Callable[[], Encoder]],
    models: Sequence[str],
    relative_cost: Sequence[float],
    train: str = "train",
    test: str = "test",
    settings: FitSettings | None = None,
    seed: int = 0,
) -> Report:
    """Run `protocol` over outcomes whose scores are known for all `models`.

    Trains Shoal's router once per encoder, of which `encoders` makes fresh ones by name.
    `relative_cost` is the cost of a query per model (any unit). With two models the first is the
    weak one. Raises `OutcomesError` where the protocol does not fit the outcomes.
    """
    learned = {name: f", {name}" if len(encoders) > 1 else "" for name in encoders}
    ours = [f"{policy}{label}" for label in learned.values() for policy in ("Clusters", "Learned")]
    predictions: dict[str, list[Floats]] = {name: [] for name in (*BASELINES, *ours, *ORACLES)}
    timings: dict[str, list[float]] = {name: [] for name in ours}
    tested: list[int] = []
    num_removed = 0
    texts = [outcome.query for outcome in outcomes]
    alike = near_duplicates(texts)
    words_QW = count_words(texts)
    for train_rows, test_rows in folds(outcomes, protocol, train=train, test=test, seed=seed):
        repeated = {other for row in test_rows for other in alike.get(row, ())}
        kept_rows = [row for row in train_rows if row not in repeated]
        kept = [outcomes[row] for row in kept_rows]
        num_removed += len(train_rows) - len(kept_rows)
        split = Split(
            models=tuple(models),
            train=kept,
            test=[outcomes[row] for row in test_rows],
            train_QW=words_QW[kept_rows],
            test_QW=words_QW[test_rows],
            seed=seed,
        )
        for name, predict in (*BASELINES.items(), *ORACLES.items()):
            predictions[name].append(predict(split))
        for name, label in learned.items():
            router = fit_router(kept, encoder=encoders[name](), models=models, settings=settings)
            predictions[f"Clusters{label}"].append(router.cluster_qualities(split.queries))
            predictions[f"Learned{label}"].append(router.qualities(split.queries))
            time_us = median_decision_us(router, split.queries)
            timings[f"Clusters{label}"].append(time_us)
            timings[f"Learned{label}"].append(time_us)
        tested += test_rows
    scores_QM = score_table([outcomes[row] for row in tested], models).scores_QM
    cost_QM = np.tile(np.asarray(relative_cost, np.float64), (len(tested), 1))
    return Report(
        title=title,
        models=tuple(models),
        num_test=len(tested),
        overlap=f"{num_removed:,} near-duplicates kept out of training",
        results=tuple(
            judge(
                name,
                np.concatenate(parts),
                scores_QM,
                cost_QM,
                fold_sizes=[len(part) for part in parts],
                decision_us=float(np.median(timings[name])) if name in timings else None,
            )
            for name, parts in predictions.items()
        ),
    )


def draw_curves(report: Report, path: Path) -> None:
    """Draw cost against quality for the main methods."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for row in report.results:
        if row.method.startswith(DRAWN):
            label = row.method if row.apgr is None else f"{row.method} (APGR {row.apgr:.3f})"
            axes.plot(row.curve.cost_P, row.curve.quality_P, label=label)
        elif row.method == "best single" and len(report.models) > 2:
            axes.axhline(row.accuracy, color="grey", linestyle=":", label="best single")
    two = len(report.models) == 2
    axes.set_xlabel(f"share of calls to {report.models[1]}" if two else "mean cost per query")
    axes.set_ylabel("mean score")
    axes.set_title(report.title, fontsize="medium")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=100)


def llmrouter_prices(folder: Path) -> dict[str, float]:
    """Return US dollars per million tokens, input and output averaged, of LLMRouter's models."""
    file = folder / "example_data" / "llm_candidates" / "default_llm.json"
    return {
        name: (float(entry["input_price"]) + float(entry["output_price"])) / 2
        for name, entry in json.loads(file.read_text()).items()
    }
