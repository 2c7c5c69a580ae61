"""What a model's own reading of a prompt says of the answer that it has not begun.

A router over the text alone does not know its models. A model that has read the prompt has said how
likely it finds the words and how sure it is of its first, and in its last hidden state more than
that: models mostly know what they know (P(IK) of Kadavath et al. 2022). A look corrects what the
router expects of one model, by ridge regression on that model's readings.

Shape legend: Q queries, P features of a reading: `_NUM_FIGURES`, then D of a hidden state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV

from policies.cascade.base import Reading
from policies.errors import PolicyError

Floats = NDArray[np.float64]

_NUM_FIGURES: Final = 3
_LEAST_READINGS: Final = 40
_REACH_SHARE: Final = 0.95
# So many standard errors, what a look gains must be above nothing.
_SURE: Final = 2.0
_RIDGES: Final = tuple(np.logspace(0, 6, 13))


@dataclass(frozen=True, kw_only=True)
class Look:
    """How one model's readings x correct its expected score: by (x - mean) / scale · weights.

    `reach` is how far they do, but for the most extreme 5% of the queries that it learned from.
    """

    mean_P: Floats
    scale_P: Floats
    weights_P: Floats
    reach: float

    @classmethod
    def of(cls, array: NDArray[np.float32], *, reach: float) -> Self:
        """Return the look that `array` holds; raises `PolicyError` where it cannot be one."""
        if array.ndim != 2 or len(array) != 3 or array.shape[1] < _NUM_FIGURES:
            raise PolicyError(f"a look of shape {array.shape} is none")
        if not (array[1] > 0).all() or not 0 <= reach < math.inf:
            raise PolicyError("a look's scale and reach are not all positive and finite")
        mean_P, scale_P, weights_P = array.astype(np.float64)
        return cls(mean_P=mean_P, scale_P=scale_P, weights_P=weights_P, reach=reach)

    @property
    def array(self) -> NDArray[np.float32]:
        """Means, scales and weights, [3, P]."""
        return np.stack((self.mean_P, self.scale_P, self.weights_P)).astype(np.float32)

    def correction(self, reading: Reading) -> float:
        """Return what to add to the expected score; what the engine did not tell counts nothing."""
        x_P = (_features(reading, len(self.mean_P)) - self.mean_P) / self.scale_P
        return float(np.nan_to_num(x_P) @ self.weights_P)


def fit_look(readings: Sequence[Reading | None], missed_Q: Floats) -> Look | None:
    """Learn a look from `missed_Q`: a model's scores, less what was expected of it unseen.

    Where that knows all tasks, looks learn little of what they tell of others; so it should not.
    NaN where the score is unknown. None where readings are too few, or where what they tell of
    queries left out, one at a time, may be chance. So the ridge is chosen, too.
    """
    pairs = [
        (one, missed)
        for one, missed in zip(readings, missed_Q.tolist(), strict=True)
        if one is not None and not math.isnan(missed)
    ]
    if len(pairs) < _LEAST_READINGS:
        return None
    size = _NUM_FIGURES + max(0 if r.state_D is None else len(r.state_D) for r, _ in pairs)
    X_QP = np.array([_features(one, size) for one, _ in pairs])
    targets_Q = np.array([missed for _, missed in pairs])
    mean_P: Floats = np.ma.masked_invalid(X_QP).mean(axis=0).filled(0.0)
    X_QP = np.where(np.isnan(X_QP), 0.0, X_QP - mean_P)
    deviation_P = X_QP.std(0)
    scale_P = np.where(deviation_P > 1e-6, deviation_P, 1.0)
    X_QP /= scale_P
    ridge = RidgeCV(alphas=_RIDGES, store_cv_results=True).fit(X_QP, targets_Q)
    errors_Q = ridge.cv_results_[:, _RIDGES.index(ridge.alpha_)]
    gained_Q = (targets_Q - targets_Q.mean()) ** 2 - errors_Q
    if gained_Q.mean() <= _SURE * gained_Q.std() / math.sqrt(len(gained_Q)):
        return None
    reach = float(np.quantile(np.abs(X_QP @ ridge.coef_), _REACH_SHARE))
    return Look(mean_P=mean_P, scale_P=scale_P, weights_P=ridge.coef_, reach=reach)


def _features(reading: Reading, size: int) -> Floats:
    """Return a reading's figures, and its hidden state with unit mean square; NaN where unknown."""
    x_P = np.full(size, np.nan)
    x_P[:_NUM_FIGURES] = (
        reading.logprob_mean,
        reading.logprob_min,
        math.nan if reading.entropy is None else reading.entropy,
    )
    state_D = reading.state_D
    if state_D is not None and len(state_D) == size - _NUM_FIGURES:
        x_P[_NUM_FIGURES:] = state_D / max(float(np.sqrt(np.mean(state_D**2))), 1e-6)
    return x_P
