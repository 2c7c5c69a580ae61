"""What a learned router is compared with: each predicts scores [Q, M] for the test queries.

Oracles look at the test scores; no router can, and they say how much there is to gain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.linear_model import Ridge
from sklearn.naive_bayes import ComplementNB

from policies.outcomes import Outcome, score_table

Floats = NDArray[np.float64]


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


BASELINES: Mapping[str, Callable[[Split], Floats]] = {
    "random": random_choice,
    "best single": best_single,
    "task classifier": task_classifier,
    "TF-IDF + ridge": tfidf_ridge,
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
