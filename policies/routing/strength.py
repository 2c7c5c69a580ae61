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

Regression in its dual form, on a sample of the queries: one factorisation serves every β and model.

Shape legend: Q queries, F features, M models, R ridges, T prices, D dimensions of a point, B bins
of similarity, S shares.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import cho_factor, cho_solve
from sklearn.model_selection import GroupKFold, KFold

from policies.routing.heads import enhance, mean_scores
from policies.routing.nearness import fit_topics

Floats = NDArray[np.float64]
Folds = Iterable[tuple[NDArray[np.intp], NDArray[np.intp]]]

MOST_QUERIES: Final = 1600
"""The right ridge hardly depends on how many queries there are; the time goes by their cube."""

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


def choose_strength(
    X_QF: sp.csr_matrix,
    points_QD: NDArray[np.float32],
    scores_QM: Floats,
    tags: Sequence[Sequence[str]],
    *,
    betas: Sequence[float],
    ridges: Sequence[float],
    num_clusters: int,
    seed: int,
) -> tuple[Strength, Belief]:
    """Return which of `betas` and `ridges` is worth most on left-out queries, and the belief in it.

    `scores_QM` are NaN where unknown; a query's task is the first of its `tags`, and similarity is
    that to one of `num_clusters` clusters of `points_QD`. Of candidates that choose as well, the
    one with the least squared error is taken.
    """
    candidates = [Strength(beta=b, ridge=r) for b in betas for r in ridges]
    tellable_Q = np.flatnonzero((~np.isnan(scores_QM)).sum(1) > 1)
    if len(candidates) == 1 or len(tellable_Q) < 2 * NUM_FOLDS:
        return candidates[0] if len(candidates) == 1 else USUAL, WHOLE
    rng = np.random.default_rng(seed)
    drawn_Q = np.sort(rng.permutation(tellable_Q)[:MOST_QUERIES])
    scores_QM, tags = scores_QM[drawn_Q], [tags[q] for q in drawn_Q]
    points_QD, kernel_QQ = points_QD[drawn_Q], products(X_QF[drawn_Q])
    prices_TM = prices(scores_QM)
    mean_M = mean_scores(scores_QM)

    def deviations(folds: Folds, ones: Sequence[Strength]) -> dict[Strength, Floats]:
        firmness = sorted({one.ridge for one in ones})
        own_RQM, tagged_RQM = left_out(kernel_QQ, scores_QM, tags, folds, firmness)
        return {
            one: one.beta * own_RQM[r] + (1 - one.beta) * tagged_RQM[r]
            for one in ones
            for r in [firmness.index(one.ridge)]
        }

    def similarities(folds: Folds) -> NDArray[np.float32]:
        similarity_Q = np.empty(len(points_QD), np.float32)
        for seen, out in folds:
            topics = fit_topics(
                points_QD[seen], scores_QM[seen], num_clusters=num_clusters, seed=seed
            )
            similarity_Q[out] = topics.similarities(points_QD[out])
        return similarity_Q

    tasks = [row[0] for row in tags]
    at_random = list(KFold(NUM_FOLDS, shuffle=True, random_state=seed).split(tasks))
    inside = deviations(at_random, candidates)

    def worth(one: Strength) -> tuple[float, float]:
        # Means of all queries: those without the left-out tasks would lean the other way.
        predicted_QM = mean_M + inside[one]
        error = float(np.nansum((predicted_QM - scores_QM) ** 2))
        value = float(policy_values(predicted_QM, scores_QM, prices_TM).mean())
        return round(value, 6), -error

    best = max(candidates, key=worth)
    if len(set(tasks)) < 2:
        return best, WHOLE
    by_task = list(GroupKFold(min(NUM_FOLDS, len(set(tasks)))).split(tasks, groups=tasks))
    belief = fit_belief(
        np.concatenate([similarities(at_random), similarities(by_task)]),
        np.concatenate([inside[best], deviations(by_task, [best])[best]]),
        np.tile(scores_QM, (2, 1)),
        mean_M,
        prices_TM,
    )
    return best, belief


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


def products(X_QF: sp.csr_matrix) -> Floats:
    """Return the queries' products [Q, Q]; features that most queries have are multiplied dense."""
    common = np.bincount(X_QF.indices, minlength=X_QF.shape[1]) > X_QF.shape[0] / 4
    dense_QF = X_QF[:, np.flatnonzero(common)].toarray()
    rare_QF = X_QF[:, np.flatnonzero(~common)]
    kernel_QQ: Floats = np.asarray((rare_QF @ rare_QF.T).toarray() + dense_QF @ dense_QF.T, float)
    return kernel_QQ


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
    kernel_QQ: Floats,
    scores_QM: Floats,
    tags: Sequence[Sequence[str]],
    folds: Folds,
    ridges: Sequence[float],
) -> tuple[Floats, Floats]:
    """Return how far regression predicts each query's scores above the models' means, [R, Q, M].

    Fitted on the folds without it: from queries' own scores, and from the means of their tags.
    """
    num_queries, num_models = scores_QM.shape
    found = np.zeros((2, len(ridges), num_queries, num_models))
    for seen, out in folds:
        seen_QM = scores_QM[seen]
        mean_M = mean_scores(seen_QM)
        tagged_QM = enhance(seen_QM, [tags[q] for q in seen], beta=0.0)
        masks_M = (~np.isnan(seen_QM)).T
        for mask_Q in {mask.tobytes(): mask for mask in masks_M}.values():
            if not mask_Q.any():
                continue
            columns = np.flatnonzero((masks_M == mask_Q).all(1))
            rows = seen[mask_Q]
            targets = np.hstack(
                [(part[mask_Q] - mean_M)[:, columns] for part in (seen_QM, tagged_QM)]
            )
            inner, across = kernel_QQ[np.ix_(rows, rows)], kernel_QQ[np.ix_(out, rows)]
            for r, ridge in enumerate(ridges):
                factor = cho_factor(inner + ridge * np.eye(len(rows)), check_finite=False)
                own, tagged = np.hsplit(across @ cho_solve(factor, targets), 2)
                for part, values in enumerate((own, tagged)):
                    found[part, r][np.ix_(out, columns)] += values
    return found[0], found[1]
