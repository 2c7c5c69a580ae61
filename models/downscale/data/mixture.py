"""How much general data a chunk's training gets: the D-CPT law, fitted on short runs.

Que et al. 2024, "D-CPT Law": the losses on the domain and on general data, as functions of the
tokens and of the mixture, are fitted on small runs and then tell the mixture of the full run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final, TypedDict

import numpy as np

from policies.errors import LawError
from policies.laws import Fitted, MixtureLaw

_CANDIDATES: Final = np.linspace(0.0, 0.9, 181)


class Point(TypedDict):
    """One judgement of one run."""

    domain: str
    general_share: float
    parameters: int
    tokens: int
    domain_loss: float
    general_loss: float


def fit_mixture(
    points: Sequence[Point], *, seed: int, num_resamples: int
) -> tuple[Fitted[MixtureLaw], Fitted[MixtureLaw]]:
    """The law of the domains' own losses and that of the general loss.

    Each takes the share of the corpus on which its loss is measured. Losses of several domains are
    pooled after division by their domain's mean, times the mean of all.

    Raises:
        LawError: too few points.
    """
    mean = float(np.mean([point["domain_loss"] for point in points]))
    means = {
        domain: np.mean([p["domain_loss"] for p in points if p["domain"] == domain])
        for domain in {point["domain"] for point in points}
    }
    fit = partial(
        MixtureLaw.fit,
        parameters=[point["parameters"] for point in points],
        tokens=[point["tokens"] for point in points],
        seed=seed,
        num_resamples=num_resamples,
    )
    domain = fit(
        shares=[1 - point["general_share"] for point in points],
        losses=[p["domain_loss"] * mean / float(means[p["domain"]]) for p in points],
    )
    general = fit(
        shares=[point["general_share"] for point in points],
        losses=[point["general_loss"] for point in points],
    )
    return domain, general


def best_share(
    domain: MixtureLaw,
    general: MixtureLaw,
    *,
    parameters: float,
    tokens: float,
    general_weight: float,
) -> float:
    """The general share with the least domain loss + `general_weight` · general loss.

    Raises:
        LawError: the laws predict no finite loss.
    """
    with np.errstate(all="ignore"):
        cost = np.array(
            [
                domain.predict(parameters, tokens, float(1 - share))
                + general_weight * general.predict(parameters, tokens, float(share))
                for share in _CANDIDATES
            ]
        )
    if not np.isfinite(cost).any():
        raise LawError("the mixture laws predict no finite loss; more short runs are needed")
    return float(_CANDIDATES[int(np.nanargmin(cost))])
