"""The traffic of a first day: what may come, while nobody has seen a whole day yet.

A mean over days of all kinds (rhythms, and how busy they are), weighted by how well each explains
the requests so far: a flat forecast would take a quiet night for the whole day.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Bins are compared with rhythms so many at a time.
_GROUP = 4
# Requests come in bursts: a group's rate is taken to scatter around the rhythm as a gamma variable
# of this shape does (relative deviation 1/sqrt(shape)), however much traffic there is.
_SHAPE = 6.0
# How busy a day may be, relative to the requests so far over the time that passed.
_LEVELS = np.geomspace(1 / 16, 16, 20)


def guess_traffic(
    counts: NDArray[np.float64],
    *,
    seen: NDArray[np.float64],
    rhythms: NDArray[np.float64],
    likely: tuple[float, float] | None,
) -> NDArray[np.float64]:
    """Return the expected requests of each bin of a whole window.

    `counts` came in the bins of which the shares `seen` have passed; each row of `rhythms` is a
    kind of day (see `daily_rhythms`). `likely` are bounds that a whole window's requests are not
    far from (four standard deviations apart); None where nothing is known.
    """
    groups = np.arange(0, len(counts), _GROUP)
    count_G, seen_G = np.add.reduceat(counts, groups), np.add.reduceat(seen, groups)
    passed = seen_G > 0
    count_G, seen_G = count_G[passed], seen_G[passed]
    usual_RG = np.add.reduceat(rhythms * seen, groups, axis=1)[:, passed]
    levels = _LEVELS * max(float(count_G.sum()), 1.0) / float(seen_G.sum())
    # Negative binomial: Poisson requests at a gamma rate. Terms that all days share are left out.
    shape_G = _SHAPE / _GROUP * seen_G
    fit_LR = np.log(usual_RG) @ count_G + count_G.sum() * np.log(levels)[:, None]
    fit_LR -= np.log(shape_G + levels[:, None, None] * usual_RG) @ (count_G + shape_G)
    if likely is not None:
        low, high = np.log(likely)
        deviations = (np.log(levels * len(counts)) - (low + high) / 2) / max((high - low) / 4, 1e-3)
        fit_LR -= deviations[:, None] ** 2 / 2
    weight_LR = np.exp(fit_LR - fit_LR.max())
    guess: NDArray[np.float64] = (levels @ weight_LR / weight_LR.sum()) @ rhythms
    return guess


def daily_rhythms(days: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return [rhythms, times] of mean one: flat, or with one or two peaks a day at any time.

    `days` are the bins' middles in days of UTC.
    """
    hours = np.arange(0, 24, 2) / 24
    once = np.cos(2 * np.pi * (days - hours[:, None]))
    twice = np.vstack([np.zeros(len(days)), 0.4 * np.cos(4 * np.pi * (days - hours[:6, None]))])
    swinging = np.concatenate([1 + size * once for size in (0.4, 0.7)])
    every = (swinging[:, None] + twice).reshape(-1, len(days))
    rhythms: NDArray[np.float64] = np.maximum(np.vstack([np.ones(len(days)), every]), 0.1)
    return rhythms
