"""How much heads are believed against what models score on average: by what routing is worth.

Two numbers decide that: the ridge of the regression, and ZOOTER's β, a query's own share in its
target. Squared error weighs mistakes that change no choice as much as those that do, so candidates
are judged by their *policy value* on queries that were left out: the mean score of the models that
they choose, less a price. Among many models there is none, quality alone counts. Between two the
question is when the better one is worth its price, so it gets all of them, from nothing to twice
its lead, as in RouteLLM's APGR.

Queries are left out in two ways: at random, as more of the same will come, and by whole tasks, as
others will. What is best differs: on new tasks nine models are best hardly told apart at all, which
costs three points where the tasks are known. A query's similarity to training says which of both it
is more like. So ridge and β are chosen by what is left out at random, and the heads are then
believed the less, the less a query is like training (`Belief`), by both together; see
docs/routing/results.md.

All queries are regressed on, for what a query's own score is worth beside its task's mean grows
with their number: of 1,600 of MMLU's questions β 0 chooses best, of eleven thousand it costs a
point. So many parts are left out one after the other as a judgement needs.

Shape legend: Q queries, F features, M models, R ridges, T prices, D dimensions of a point, B bins
of similarity, S shares, L queries left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray
from sklearn.model_selection import GroupKFold, KFold

from policies.routing.heads import enhance, mean_scores, ridge_regression
from policies.routing.nearness import fit_topics

Floats = NDArray[np.float64]
Parts = Sequence[tuple[NDArray[np.intp], NDArray[np.intp]]]
"""Which queries are seen, and which are left out."""

ENOUGH_LEFT_OUT: Final = 4000
"""Left-out queries with which candidates are told apart; fewer queries are all left out once."""

NUM_FOLDS: Final = 5
NUM_PRICES: Final = 9
NUM_BINS: Final = 6
SHARES: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
# So many standard errors, what is gained by believing less must be above nothing.
_SURE: Final = 2.0


@dataclass(frozen=True, kw_only=True)
class Strength:
    """`beta` in [0, 1] is a query's own share in its target; `ridge` > 0 weighs |w|²."""

    beta: float
    ridge: float


@dataclass(frozen=True, kw_only=True)
class Belief:
    """What share of what the heads say counts, by a query's similarity to its nearest cluster.

    `shares_B` in [0, 1] ascend with similarity, whose bins meet at `edges`, one fewer. What does
    not count is as models score on average.
    """

    edges: Floats
    shares_B: Floats

    def of(self, similarity: ArrayLike) -> Floats:
        """Return the shares at similarities of any shape."""
        return self.shares_B[self.edges.searchsorted(similarity, side="right")]


WHOLE: Final = Belief(edges=np.empty(0), shares_B=np.ones(1))
"""Where whole tasks cannot be left out."""

USUAL: Final = Strength(beta=0.7, ridge=10.0)
"""Where no query has two scores, so that nothing can be said of choosing."""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """How far regression predicts scores above the models' means, of queries that it has not seen.

    [L, M] each: from queries' own scores, and from the means of their tags.
    """

    own_LM: Floats
    tagged_LM: Floats

    def deviations(self, beta: float) -> Floats:
        """Return what targets with this share of a query's own score lead to, [L, M]."""
        mixed: Floats = beta * self.own_LM + (1 - beta) * self.tagged_LM
        return mixed


def choose_strength(
    X_QF: sp.csr_matrix,
    scores_QM: Floats,
    tags: Sequence[Sequence[str]],
    *,
    betas: Sequence[float],
    ridges: Sequence[float],
    seed: int,
) -> Strength:
    """Return which of `betas` and `ridges` is worth most on queries left out at random.

    `scores_QM` are NaN where unknown. Of candidates that choose as well, the one with the least
    squared error is taken.
    """
    candidates = [Strength(beta=b, ridge=r) for b in betas for r in ridges]
    tellable_Q = (~np.isnan(scores_QM)).sum(1) > 1
    if len(candidates) == 1 or tellable_Q.sum() < 2 * NUM_FOLDS:
        return candidates[0] if len(candidates) == 1 else USUAL
    parts = _enough(_at_random(len(tags), seed), tellable_Q)
    scores_LM = scores_QM[np.concatenate([out for _, out in parts])]
    mean_M, prices_TM = mean_scores(scores_QM), prices(scores_QM)

    def worth(beta: float, found: LeftOut) -> tuple[float, float]:
        predicted_LM = mean_M + found.deviations(beta)
        error = float(np.nansum((predicted_LM - scores_LM) ** 2))
        value = float(policy_values(predicted_LM, scores_LM, prices_TM).mean())
        return round(value, 6), -error

    worths: dict[Strength, tuple[float, float]] = {}
    with ThreadPoolExecutor(2) as threads:  # sparse products let each other run
        every = threads.map(partial(left_out, X_QF, scores_QM, tags, parts), ridges)
        for ridge, found in zip(ridges, every, strict=True):
            worths |= {Strength(beta=beta, ridge=ridge): worth(beta, found) for beta in betas}
    return max(candidates, key=worths.__getitem__)


def choose_belief(
    X_QF: sp.csr_matrix,
    points_QD: NDArray[np.float32],
    scores_QM: Floats,
    tags: Sequence[Sequence[str]],
    strength: Strength,
    *,
    num_clusters: int,
    seed: int,
) -> Belief:
    """Return the belief in heads of this strength, from queries and whole tasks left out.

    A query's task is the first of its tags, and similarity is that to one of `num_clusters`
    clusters of `points_QD`.
    """
    tasks = [row[0] for row in tags]
    if len(set(tasks)) < 2 or ((~np.isnan(scores_QM)).sum(1) > 1).sum() < 2 * NUM_FOLDS:
        return WHOLE
    by_task = list(GroupKFold(min(NUM_FOLDS, len(set(tasks)))).split(tasks, groups=tasks))
    rows, similarities, deviations = [], [], []
    for parts in (_at_random(len(tags), seed), by_task):
        found = left_out(X_QF, scores_QM, tags, parts, ridge=strength.ridge)
        deviations.append(found.deviations(strength.beta))
        for seen, out in parts:
            topics = fit_topics(
                points_QD[seen], scores_QM[seen], num_clusters=num_clusters, seed=seed
            )
            similarities.append(topics.similarities(points_QD[out]))
            rows.append(out)
    return fit_belief(
        np.concatenate(similarities),
        np.concatenate(deviations),
        scores_QM[np.concatenate(rows)],
        # Means of all queries: those without the left-out tasks would lean the other way.
        mean_scores(scores_QM),
        prices(scores_QM),
    )


def fit_belief(
    similarity_Q: NDArray[np.float32],
    deviation_QM: Floats,
    scores_QM: Floats,
    mean_M: Floats,
    prices_TM: Floats,
) -> Belief:
    """Return the shares of deviations from `mean_M` that choose best, of all that ascend.

    Bin by bin the value of every share is known; the best ascending sequence is found by dynamic
    programming over bins and shares. All counts everywhere where what that gains may be chance:
    shares that differ by bin also change which queries are worth a better model's price.
    """
    edges: Floats = np.quantile(
        similarity_Q.astype(np.float64), np.linspace(0, 1, NUM_BINS + 1)[1:-1]
    )
    bins_Q = edges.searchsorted(similarity_Q, side="right")
    worth_SQ = np.stack(
        [policy_values(mean_M + share * deviation_QM, scores_QM, prices_TM) for share in SHARES]
    )
    worth_BS = np.array([worth_SQ[:, bins_Q == bin_].sum(1) for bin_ in range(NUM_BINS)])
    # Sequences by their last share, each with what it is worth; of equals the larger share.
    ends: list[tuple[float, tuple[int, ...]]] = [
        (float(worth), (share,)) for share, worth in enumerate(worth_BS[0])
    ]
    for worth_S in worth_BS[1:]:
        ends = [
            (before + float(worth_S[share]), (*shares, share))
            for share in range(len(SHARES))
            for before, shares in [max(ends[: share + 1])]
        ]
    _, shares = max(ends)
    gained_Q = worth_SQ[np.array(shares)[bins_Q], np.arange(len(bins_Q))] - worth_SQ[-1]
    if gained_Q.mean() <= _SURE * gained_Q.std() / math.sqrt(len(gained_Q)):
        return WHOLE
    return Belief(edges=edges, shares_B=np.array([SHARES[share] for share in shares]))


def prices(scores_QM: Floats) -> Floats:
    """Return the models' prices [T, M]: none, but between two up to twice the better one's lead."""
    mean_M = mean_scores(scores_QM)
    above_M: Floats = mean_M - mean_M.min()
    times_T = np.linspace(0, 2, NUM_PRICES if len(mean_M) == 2 else 1)
    return times_T[:, None] * above_M


def policy_values(predicted_QM: Floats, scores_QM: Floats, prices_TM: Floats) -> Floats:
    """Return score less price, the mean over prices, of the models with the highest predicted one.

    That is [Q]. The choice is among the models whose score is known (not NaN).
    """
    known_QM = ~np.isnan(scores_QM)
    total_Q = np.zeros(len(scores_QM))
    for price_M in prices_TM:
        chosen_Q1 = np.where(known_QM, predicted_QM - price_M, -np.inf).argmax(1)[:, None]
        total_Q += np.take_along_axis(scores_QM - price_M, chosen_Q1, 1)[:, 0]
    return total_Q / len(prices_TM)


def left_out(
    X_QF: sp.csr_matrix,
    scores_QM: Floats,
    tags: Sequence[Sequence[str]],
    parts: Parts,
    ridge: float,
) -> LeftOut:
    """Return what each part's queries are predicted by the regression on all others, in turn."""
    found = []
    for seen, out in parts:
        seen_QM = scores_QM[seen]
        tagged_QM = enhance(seen_QM, [tags[q] for q in seen], beta=0.0)
        known_QM = ~np.isnan(seen_QM)
        deviations = [
            np.where(known_QM, part - mean_scores(seen_QM), 0.0) for part in (seen_QM, tagged_QM)
        ]
        W_FC = ridge_regression(
            X_QF[seen], np.hstack(deviations), np.hstack([known_QM, known_QM]), ridge=ridge
        )
        found.append(np.asarray(X_QF[out] @ W_FC, np.float64))
    own_LM, tagged_LM = np.hsplit(np.concatenate(found), 2)
    return LeftOut(own_LM=own_LM, tagged_LM=tagged_LM)


def _at_random(num_queries: int, seed: int) -> Parts:
    folds = KFold(NUM_FOLDS, shuffle=True, random_state=seed)
    return list(folds.split(np.zeros(num_queries)))


def _enough(parts: Parts, tellable_Q: NDArray[np.bool_]) -> Parts:
    """Return the first of the parts, until they have enough queries that tell choices apart."""
    sums = np.cumsum([tellable_Q[out].sum() for _, out in parts])
    return parts[: int(sums.searchsorted(ENOUGH_LEFT_OUT)) + 1]
