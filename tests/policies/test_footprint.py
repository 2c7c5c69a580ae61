"""Pricing plans before they run."""

import pytest

from policies.footprint import Footprint, Rates, estimate
from policies.plan import Answer, Best, Cascade, Plan

CHEAP = Rates(
    usd_per_input_token=1e-6,
    usd_per_output_token=2e-6,
    wh_per_input_token=1e-5,
    wh_per_output_token=3e-5,
    gco2e_per_wh=0.4,
    s_per_output_token=0.01,
)
DEAR = Rates(usd_per_input_token=4e-6, usd_per_output_token=8e-6, s_per_output_token=0.03)
RATES = {"cheap": CHEAP, "dear": DEAR}
ONE = Answer(members=("cheap",))
TWO = Answer(members=("cheap", "dear"))


def price(plan: Plan) -> Footprint:
    """Price 100 prompt tokens and 10 of output."""
    return estimate(plan, RATES, prompt_tokens=100, output_tokens=10)


def test_one_member_costs_its_tokens() -> None:
    """USD, Wh and gCO2e are tokens times rates."""
    cost = price(ONE)
    assert cost.usd == pytest.approx(100e-6 + 20e-6)
    assert cost.wh == pytest.approx(100e-5 + 30e-5)
    assert cost.gco2e == pytest.approx(0.4 * 130e-5)
    assert cost.latency_s == pytest.approx(0.1)


def test_fused_members_add_cost_but_share_time() -> None:
    """A fused answer costs the sum of its members and lasts as long as the slowest."""
    cost = price(TWO)
    assert cost.usd == pytest.approx(120e-6 + 480e-6)
    assert cost.latency_s == pytest.approx(0.3)


def test_a_cascade_is_priced_at_its_most() -> None:
    """Every stage counts, one after another."""
    cost = price(Cascade(stages=(ONE, TWO), thresholds=(0.5,)))
    assert cost.usd == pytest.approx(price(ONE).usd + price(TWO).usd)
    assert cost.latency_s == pytest.approx(0.1 + 0.3)


def test_candidates_run_side_by_side() -> None:
    """Best-of adds cost; the slowest candidate sets the time."""
    cost = price(Best(candidates=(ONE, ONE, TWO)))
    assert cost.usd == pytest.approx(2 * price(ONE).usd + price(TWO).usd)
    assert cost.latency_s == pytest.approx(0.3)
