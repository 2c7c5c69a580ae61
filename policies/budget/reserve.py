"""What may be spent on the requests to come, so that a surprise can still be made up for.

Too much can be taken back only as far as the cheapest plans go. So the mean request is allowed what
spreads the budget evenly, less a reserve for what no forecast knows, and never more than leaves, at
every later time, enough for the cheapest plans through a busy rest of the window. Nor is so much
held back that the best plans could not use it up any more.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from policies.budget.pace import BINS_PER_HOUR
from policies.budget.prices import Frontier

# What comes in an hour is taken to scatter around the forecast as a gamma variable of this shape
# does (relative deviation 1/sqrt(shape)): bursts come when nobody expects them.
_SHAPE = 6.0
# A busy rest of the window, or a quiet one: so many standard deviations off the forecast.
_DEVIATIONS = 2.0
# What may be missing in the end, as a share of a window's budget.
_TOLERANCE = 0.005
# What no forecast knows, a grid that turns dirty or a new client: a whole window's plan keeps this
# share of it back, half a window's the half.
_UNKNOWN = 0.5
# It is to be used up in the end, though: what spreads evenly may grow by at most this share of the
# way to what the best plans for everybody would cost.
_ABSORBED = 0.35
# And it may cost this share of the quality at most, again of a whole window's plan: where little
# can be decided, keeping back a third would take most of it.
_PREMIUM = 0.02
# Later times are looked at every so many bins.
_EVERY_BINS = 2


def allowance(
    *,
    left: float,
    budget: float,
    window_left: float,
    requests: NDArray[np.float64],
    weights: NDArray[np.float64],
    frontier: Frontier,
) -> float:
    """Return what the mean request to come may cost.

    `left` is what is left of the window's `budget` (both in the resource's unit), `window_left` the
    share of the window to come. `requests` are those of each future bin and `weights` what one of
    them costs there relative to now; `frontier` is what a mean cost buys now.
    """
    load = requests * weights
    total = max(float(load.sum()), 1e-9)
    even = max(left / total, 0.0)
    absorbed = even + _ABSORBED * max(0.0, frontier.dearest - even)
    worth = frontier.quality_at(even) * (1 - _PREMIUM * window_left)
    rate = max(
        even / (1 + _UNKNOWN * window_left),
        even * even / max(absorbed, 1e-30),
        min(even, frontier.cost_of(worth)),
    )
    # At each cut the load before it, the load after it, and the latter's standard deviation:
    # Poisson requests at a rate that scatters from one hour to the next.
    near = np.convolve(load, np.ones(BINS_PER_HOUR))[BINS_PER_HOUR // 2 :][: len(load)]
    variance = np.cumsum((load * (near / _SHAPE + weights))[::-1])[::-1]
    cuts = np.arange(_EVERY_BINS, len(load), _EVERY_BINS)
    after = np.cumsum(load[::-1])[::-1][cuts]
    before = np.maximum(total - after, 1e-9 * total)
    deviation = np.sqrt(variance[cuts])
    # What a quiet rest has no use for is spent within the hour.
    quiet = np.maximum(after - _DEVIATIONS * deviation, 0.0)
    least = ((left - frontier.dearest * quiet) / before)[cuts <= BINS_PER_HOUR]
    rate = max(rate, min(float(least.max(initial=0.0)), frontier.dearest))
    busy = after + _DEVIATIONS * deviation
    most = (left + _TOLERANCE * budget - frontier.cheapest * busy) / before
    rate = max(0.0, min(rate, float(most.min(initial=np.inf))))
    return rate * total / max(float(requests.sum()), 1e-9)
