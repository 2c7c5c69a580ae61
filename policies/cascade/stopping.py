"""When a stage is hopeless: an upper bound of its score, from the beginning of its answer.

While an answer grows, the sum and the least of its log-probabilities can only fall, and with them
any estimate that reads nothing else of the answer and rises with both. Such an estimate falls below
a cut somewhere on the way exactly if it lies below it in the end. So how often it stops an answer
that would have been accepted is counted on finished answers; no token-by-token records are needed.

The cut of a threshold is the split-conformal quantile (Vovk et al. 2005): of fresh answers like the
training's whose score reaches the threshold, at most a share `FALSE_STOPS` lies below it.

Shape legend: N answers, P falling signals, K thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import lsq_linear

from policies.cascade.chains import Floats

FALSE_STOPS = 0.01
NUM_FALLING = 4
THRESHOLDS_K: Floats = np.arange(1, 100) / 100


def fit_stopping(falling_NP: Floats, logit_N: Floats) -> tuple[Floats, Floats]:
    """Return the estimate's weights [P] and the cut of every threshold [K], ascending.

    `falling_NP` are the answers' `falling_signals`; `logit_N` the logits of their out-of-fold
    scores, at the most that earlier stages' answers could make of them. The estimate is least
    squares, with no negative weight on what falls.
    """
    at_least_P = np.array([-np.inf, -np.inf, 0.0, 0.0])
    weights_P: Floats = lsq_linear(falling_NP, logit_N, bounds=(at_least_P, np.inf)).x
    estimate_N = falling_NP @ weights_P
    threshold_logit_K = np.log(THRESHOLDS_K / (1 - THRESHOLDS_K))
    cut_K = np.array([_cut(estimate_N[logit_N >= least]) for least in threshold_logit_K])
    known = np.isfinite(cut_K)
    if not known.any():
        return weights_P, np.full(THRESHOLDS_K.size, -np.inf)
    # A lower threshold is never harder to reach; one that too few reach takes the last known cut.
    kept_K = np.minimum.accumulate(np.where(known, cut_K, np.inf)[::-1])[::-1]
    last = int(np.flatnonzero(known)[-1])
    kept_K[last:] = cut_K[last]
    return weights_P, kept_K


def ceiling(weights_P: Floats, cut_K: Floats, falling: Sequence[float]) -> float:
    """Return the least threshold that an answer with these signals will not reach, else 1."""
    passed = int(np.searchsorted(cut_K, weights_P @ np.array(falling), side="right"))
    return float(THRESHOLDS_K[passed]) if passed < cut_K.size else 1.0


def _cut(estimate_n: Floats) -> float:
    """Return the conformal quantile of the answers that reach a threshold, NaN for too few."""
    rank = int(FALSE_STOPS * (estimate_n.size + 1))
    return float(np.partition(estimate_n, rank - 1)[rank - 1]) if rank else float("nan")
