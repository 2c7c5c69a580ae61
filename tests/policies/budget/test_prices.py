"""Targets' prices: what the next request may cost, and how a price follows."""

import math
import random

import pytest

from policies.budget.prices import BudgetTarget, DualPrice, Rest

HOURLY = BudgetTarget(resource="wh", amount=100.0)
CARBON = BudgetTarget(resource="gco2e", amount=100.0)


def rest(requests=1000.0, *, share=0.5, known=True, dirty_requests=None):
    """Return what is to come of a day."""
    return Rest(
        seconds=share * 86_400,
        share=share,
        requests=requests,
        dirty_requests=dirty_requests or requests,
        known=known,
    )


def price_of(cheapest=1.0, best=10.0):
    """Return the price of a resource of which plans cost so much."""
    price = DualPrice()
    price.see(cheapest=cheapest, best=best)
    return price


def test_nothing_is_priced_while_the_best_plans_fit():
    """A slack target costs no quality, whatever single requests cost."""
    price = price_of(best=10.0)
    price.step(expected=50.0, allowed=11.0, to_come=10.0)
    assert price.value == 0.0
    price.step(expected=1.0, allowed=9.0, to_come=10.0)
    assert price.value > 0.0


def test_a_price_rises_with_what_costs_too_much_and_falls_with_what_costs_too_little():
    """By a factor, so that costs of any unit are alike."""
    for unit in (1e-6, 1.0):
        price = price_of(cheapest=unit, best=10 * unit)
        price.step(expected=unit, allowed=4 * unit, to_come=1000.0)
        first = price.value
        price.step(expected=10 * unit, allowed=4 * unit, to_come=1000.0)
        risen = price.value
        price.step(expected=unit, allowed=4 * unit, to_come=1000.0)
        assert risen / first == pytest.approx(math.exp(1.0 * 1.5))
        assert price.value / risen == pytest.approx(math.exp(-0.75))


def test_steps_shrink_as_a_price_has_learned():
    """After a thousand requests a surprise moves it by a few percent, near the end by more."""
    price = price_of()
    for _ in range(1000):
        price.see(cheapest=1.0, best=10.0)
    price.step(expected=10.0, allowed=4.0, to_come=5000.0)
    before = price.value
    price.step(expected=10.0, allowed=4.0, to_come=5000.0)
    assert 1.02 < price.value / before < 1.1
    before = price.value
    price.step(expected=10.0, allowed=4.0, to_come=200.0)
    assert price.value / before > 1.3


def test_the_price_of_a_stream_meets_its_allowance():
    """Requests of random worth (seed 1) spend what is allowed on average, the worthiest first."""
    rng = random.Random(1)
    price, total, taken, left_out = DualPrice(), 0.0, [], []
    for number in range(20_000):
        gain = rng.random()
        price.see(cheapest=1.0, best=10.0)
        large = gain > price.value * 9.0
        cost = 10.0 if large else 1.0
        price.step(expected=cost, allowed=4.0, to_come=20_000.0 - number)
        if number > 2000:
            total += cost
            (taken if large else left_out).append(gain)
    assert total / 17_999 == pytest.approx(4.0, rel=0.02)
    # A third may take the large plan: those with the highest gains.
    assert sum(taken) / len(taken) > 0.78
    assert sum(left_out) / len(left_out) < 0.40


def test_the_highest_price_is_one_right_answer_per_cheapest_plan():
    """Where a target cannot be kept, quality is not given up for hair's breadths of cost."""
    price = price_of(cheapest=2.0, best=10.0)
    for _ in range(500):
        price.step(expected=2.0, allowed=0.1, to_come=100.0)
    assert price.value == pytest.approx(0.5)


def test_what_is_left_is_shared_by_what_is_to_come():
    """Late in a window nearly evenly; a little more, as fewer may come than are expected."""
    price = price_of(cheapest=0.1)
    even = price.allowed(HOURLY, left=100.0, rest=rest(100.0, share=0.0))
    assert 1.0 < even < 1.3
    assert price.allowed(HOURLY, left=-5.0, rest=rest(100.0)) == pytest.approx(0.01)


def test_carbon_counts_requests_of_dirty_hours_for_more():
    """Before a dirty evening the same budget allows less than one of another resource."""
    price = price_of(cheapest=0.1)
    later = rest(1000.0, share=0.0, dirty_requests=2000.0)
    ratio = price.allowed(CARBON, left=1000.0, rest=later) / price.allowed(
        HOURLY, left=1000.0, rest=later
    )
    assert ratio == pytest.approx(0.5, rel=0.05)


def test_a_reserve_is_what_the_cheapest_plans_may_need():
    """Early more than late, the more the dearer the cheapest plans, on a first day the most."""

    def kept_back(**given):
        cheapest = given.pop("cheapest", 1.0)
        even = 4000.0 / (1000.0 - 1.5 * math.sqrt(1000.0))
        return even - price_of(cheapest).allowed(HOURLY, left=4000.0, rest=rest(**given))

    assert kept_back(share=0.0) == pytest.approx(0.0)
    assert 0 < kept_back(share=0.5) < kept_back(share=1.0)
    assert kept_back(share=1.0, cheapest=0.5) < kept_back(share=1.0, cheapest=1.5)
    assert kept_back(share=1.0, known=False) > kept_back(share=1.0)


def test_more_requests_bring_more_budget_where_they_are_what_counts():
    """Per thousand requests nothing is kept back."""
    target = BudgetTarget(resource="wh", amount=100.0, per="1000_requests")
    assert price_of().allowed(target, left=400.0, rest=rest(100.0)) == pytest.approx(4.0)
