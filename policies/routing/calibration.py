"""From logits to probabilities that mean what they say.

Shape legend: Q queries, M models.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Platt:
    """Scaling of logits, P = σ(slope·z + offset) (Platt 1999); fit it on held-out z.

    One pair for all models: a pair per model fits the noise of each and then ranks models by it
    (nine models, 381 queries: accuracy 0.57 instead of 0.62, for an ECE 0.01 lower).
    """

    slope: float
    offset: float

    def scaled(self, logits_QM: Floats) -> Floats:
        """Return the calibrated probabilities."""
        scaled: Floats = expit(logits_QM * self.slope + self.offset)
        return scaled


def fit_platt(logits_QM: Floats, scores_QM: Floats) -> Platt:
    """Fit slope and offset by maximum likelihood with a weak pull towards the identity.

    Unknown scores (NaN) are left out.
    """
    known = ~np.isnan(scores_QM)
    z, y = logits_QM[known], scores_QM[known]

    def loss(parameters: Floats) -> tuple[float, Floats]:
        slope, offset = parameters
        scaled = slope * z + offset
        error = expit(scaled) - y
        pull = np.array([slope - 1, offset])
        value = np.sum(np.logaddexp(0, scaled) - y * scaled) + pull @ pull / 2
        return float(value), np.array([error @ z, error.sum()]) + pull

    # A negative slope would turn the ranking of queries upside down on noise alone.
    bounds = [(0.05, 5.0), (-5.0, 5.0)]
    result = minimize(loss, np.array([1.0, 0.0]), jac=True, method="L-BFGS-B", bounds=bounds)
    return Platt(slope=float(result.x[0]), offset=float(result.x[1]))


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """A reliability diagram: per bin of predictions, mean prediction, mean score, and count."""

    predicted: Floats
    observed: Floats
    count: Floats

    @property
    def ece(self) -> float:
        """Expected calibration error: count-weighted mean |predicted - observed|."""
        gap = np.abs(self.predicted - self.observed)
        return float(np.sum(gap * self.count) / np.sum(self.count))


def reliability(predicted: Floats, observed: Floats, *, num_bins: int = 15) -> Reliability:
    """Bin predictions by equal counts (equal widths would leave most bins empty).

    Both arguments hold one number per prediction; pairs with an unknown score are left out.
    """
    known = ~np.isnan(observed)
    order = np.argsort(predicted[known], kind="stable")
    p, y = predicted[known][order], observed[known][order]
    bins = [b for b in np.array_split(np.arange(len(p)), num_bins) if len(b)]
    return Reliability(
        predicted=np.array([p[b].mean() for b in bins]),
        observed=np.array([y[b].mean() for b in bins]),
        count=np.array([float(len(b)) for b in bins]),
    )
