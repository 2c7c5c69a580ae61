"""Dual prices meet the mean cost allowed, at the best quality there is for it."""

import numpy as np
import pytest
from scipy.optimize import linprog

from policies.budget.prices import Level, Samples, frontiers, solve_prices

NOW = (Level(share=1.0, factors=(1.0,)),)


def crowd(num=600, seed=5):
    """Return random candidates: dearer ones are better, by a different amount for each."""
    rng = np.random.default_rng(seed)
    costs = np.cumsum(rng.uniform(0.1, 1.0, size=(num, 4)), axis=1)
    qualities = np.sort(rng.uniform(0, 1, size=(num, 4)), axis=1)
    return qualities, costs[:, :, None]


def mean_cost(qualities, costs, price):
    """Return the mean cost when everybody takes the best bargain at `price`."""
    best = np.argmax(qualities - price * costs[:, :, 0], axis=1)
    return costs[np.arange(len(best)), best, 0].mean()


@pytest.mark.parametrize("allowance", [0.7, 1.0, 1.6])
def test_the_price_meets_the_allowance(allowance):
    """Mean cost at the price is the allowance, from below, to about a percent."""
    qualities, costs = crowd()
    [price] = solve_prices(qualities, costs, allowances=[allowance], levels=NOW, start=[0.0])
    assert 0.98 * allowance <= mean_cost(qualities, costs, price) <= allowance


def test_the_price_is_the_linear_programs_dual():
    """The same trade-off as the offline optimum: its multiplier is our price."""
    qualities, costs = crowd(num=300)
    num = qualities.size
    rows = np.kron(np.eye(len(qualities)), np.ones((1, 4)))
    solution = linprog(
        -qualities.ravel(),
        A_ub=costs.reshape(1, num),
        b_ub=[1.0 * len(qualities)],
        A_eq=rows,
        b_eq=np.ones(len(qualities)),
        method="highs",
    )
    [price] = solve_prices(qualities, costs, allowances=[1.0], levels=NOW, start=[0.0])
    assert price == pytest.approx(-solution.ineqlin.marginals[0], rel=0.05)


def test_plenty_costs_nothing():
    """Where the best plans fit the allowance, the price is zero."""
    qualities, costs = crowd()
    assert solve_prices(qualities, costs, allowances=[9.0], levels=NOW, start=[3.0]) == (0.0,)


@pytest.mark.parametrize("start", [0.0, 1e9])
def test_an_impossible_allowance_has_the_highest_price(start):
    """What the cheapest plan costs is then worth one right answer, whatever the price was."""
    qualities, costs = crowd()
    [price] = solve_prices(qualities, costs, allowances=[0.0], levels=NOW, start=[start])
    assert price == pytest.approx(1 / costs[:, 0, 0].mean())


def test_quality_is_not_given_up_for_hairs_breadths():
    """Where plans cost alike to a percent, not even an impossible allowance takes the worse one."""
    qualities, _ = crowd()
    costs = np.broadcast_to(np.array([1.0, 1.002, 1.005, 1.01])[:, None], (600, 4, 1))
    [price] = solve_prices(qualities, costs, allowances=[0.5], levels=NOW, start=[0.0])
    best = np.argmax(qualities - price * costs[:, :, 0], axis=1)
    kept = qualities[np.arange(600), best].mean()
    assert kept > 0.97 * qualities.max(axis=1).mean()


def test_two_resources_are_held_together():
    """Each mean is within its allowance, and a slack resource is free."""
    qualities, costs = crowd()
    second = np.random.default_rng(6).permutation(costs)
    both = np.concatenate([costs, second], axis=2)
    level = (Level(share=1.0, factors=(1.0, 1.0)),)
    prices = solve_prices(qualities, both, allowances=[1.0, 1.3], levels=level, start=[0.0, 0.0])
    best = np.argmax(qualities - both @ np.array(prices), axis=1)
    means = both[np.arange(len(best)), best].mean(axis=0)
    assert (means <= np.array([1.03, 1.34])).all()
    assert (
        solve_prices(qualities, both, allowances=[1.0, 99.0], levels=level, start=[0.0, 0.0])[1]
        == 0.0
    )


def test_dirty_hours_ahead_raise_the_price():
    """If half of what comes costs twice as much, the same allowance needs a higher price."""
    qualities, costs = crowd()
    levels = (Level(share=0.5, factors=(1.0,)), Level(share=0.5, factors=(2.0,)))
    [now] = solve_prices(qualities, costs, allowances=[1.0], levels=NOW, start=[0.0])
    [ahead] = solve_prices(qualities, costs, allowances=[1.0], levels=levels, start=[0.0])
    assert ahead > now


def test_samples_are_a_ring_that_forgets_the_oldest():
    """After more requests than there is room, the first are gone; padding never wins."""
    samples = Samples(size=3, max_candidates=4, num_resources=1)
    for number in range(5):
        samples.add([0.1 * number, 0.5], [[1.0 * number, 2.0]])
    qualities, costs = samples.view()
    assert qualities.shape == (3, 2)
    assert sorted(costs[:, 0, 0].tolist()) == [2.0, 3.0, 4.0]
    samples.add([0.9], [[7.0]])
    qualities, _ = samples.view()
    assert (qualities.max(axis=1) > 0).all()
    assert not samples.fits(5)
    samples.rescale(0, 10.0)
    assert samples.view()[1].max() == 70.0


def test_a_frontier_is_what_the_prices_buy():
    """From the cheapest plans to the best ones, it says what solved prices then attain."""
    qualities, costs = crowd()
    [frontier] = frontiers(qualities, costs)
    assert frontier.cheapest == pytest.approx(costs[:, 0, 0].mean())
    assert frontier.dearest == pytest.approx(costs[:, -1, 0].mean())
    for allowance in (0.7, 1.0, 1.6):
        [price] = solve_prices(qualities, costs, allowances=[allowance], levels=NOW, start=[0.0])
        best = np.argmax(qualities - price * costs[:, :, 0], axis=1)
        bought = qualities[np.arange(len(best)), best].mean()
        assert frontier.quality_at(allowance) == pytest.approx(bought, rel=0.05)
        assert frontier.cost_of(bought) == pytest.approx(allowance, rel=0.05)
