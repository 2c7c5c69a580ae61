"""How much the mean request to come may cost: spread evenly, less what a surprise may need."""

import numpy as np
import pytest

from policies.budget.prices import Frontier
from policies.budget.reserve import allowance

EVEN = {"requests": np.full(96, 10.0), "weights": np.ones(96), "budget": 960.0}


def flat(cheapest, dearest=10.0):
    """Return plans among which hardly anything is gained by spending more."""
    return Frontier(costs=np.array([cheapest, dearest]), qualities=np.array([0.9, 0.901]))


def test_a_reserve_shrinks_with_the_window():
    """At midnight a third is kept back for what no forecast knows, at its end nothing."""
    for share in (1.0, 0.5, 0.0):
        rate = allowance(left=960.0, window_left=share, frontier=flat(0.0), **EVEN)
        assert rate == pytest.approx(1 / (1 + 0.5 * share))


def test_what_is_kept_back_can_still_be_used():
    """Where the best plans for everybody cost little more than there is, little is kept back."""
    tight = allowance(left=960.0, window_left=1.0, frontier=flat(0.0, 1.4), **EVEN)
    assert tight == pytest.approx(1 / 1.14)
    assert allowance(left=960.0, window_left=1.0, frontier=flat(0.0, 0.9), **EVEN) == 1.0


def test_what_a_quiet_rest_has_no_use_for_is_spent_within_the_hour():
    """Two hours before the end, what spreads evenly would be left over should few come."""
    late = {"requests": np.full(8, 10.0), "weights": np.ones(8), "budget": 960.0}
    rates = [
        allowance(left=80.0, window_left=0.0, frontier=flat(0.0, dearest), **late)
        for dearest in (10.0, 1.3)
    ]
    assert rates == [pytest.approx(1.0), pytest.approx(1.3)]


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_reserve_costs_a_fiftieth_of_the_quality_at_most(share):
    """Where quality falls steeply below what is left, a window's plan gives up 2% of it."""
    steep = Frontier(costs=np.array([0.0, 1.0, 10.0]), qualities=np.array([0.0, 0.5, 0.9]))
    rate = allowance(left=960.0, window_left=share, frontier=steep, **EVEN)
    assert steep.quality_at(rate) == pytest.approx((1 - 0.02 * share) * 0.5)


def test_the_cheapest_plans_can_always_see_a_busy_evening_through():
    """Where they cost most of what is left, less is planned than that, and less the dearer."""
    rates = [
        allowance(left=960.0, window_left=0.0, frontier=flat(cheapest), **EVEN)
        for cheapest in (0.3, 0.85, 0.95)
    ]
    assert rates[0] == pytest.approx(1.0)
    assert rates[0] > rates[1] > rates[2]


def test_a_short_rest_needs_a_larger_share_in_reserve():
    """A burst may double a window's last hour; over a day bursts average out."""
    late = {"requests": np.full(4, 10.0), "weights": np.ones(4), "budget": 960.0}
    early = allowance(left=960.0, window_left=0.0, frontier=flat(0.85), **EVEN)
    last = allowance(left=40.0, window_left=0.0, frontier=flat(0.85), **late)
    assert 0 < last < early < 1


def test_nothing_is_allowed_once_everything_is_spent():
    """The price is then as high as it goes; an allowance below zero would mean nothing."""
    assert allowance(left=-5.0, window_left=0.5, frontier=flat(0.1), **EVEN) == 0.0


def test_the_budget_of_the_mean_request_is_the_same_on_any_grid():
    """A grid twice as dirty for half of the requests leaves the mean request what it was."""
    dirty = {**EVEN, "weights": np.repeat([1.0, 2.0], 48)}
    even = allowance(left=960.0, window_left=0.0, frontier=flat(0.0), **EVEN)
    # It is the price that moves spending to the clean half.
    assert allowance(left=960.0, window_left=0.0, frontier=flat(0.0), **dirty) == pytest.approx(
        even
    )
