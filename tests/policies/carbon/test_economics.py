"""A price from hardware, against accounts kept second by second."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from policies.base import ModelFacts
from policies.carbon.economics import DeviceCosts, EconomicsSettings, break_even, device_price
from policies.carbon.llmcarbon import find_device
from policies.carbon.settings import CarbonSettings
from policies.footprint import Rates
from policies.kinds import explain

H200 = find_device("h200")
COSTS = DeviceCosts(
    device_usd=40_000, lifetime_years=4, utilisation=0.4, usd_per_kwh=0.2, other_usd_per_hour=1.0
)
PUE = 1.3


def paid(costs: DeviceCosts, *, busy_w: float, hours: int = 1000) -> float:
    """Return what an owner pays in `hours`, hour after hour, for a device that works a share."""
    usd = 0.0
    for hour in range(hours):
        busy = hour < hours * costs.utilisation
        watts = busy_w if busy else H200.idle_w
        usd += costs.device_usd / (costs.lifetime_years * 365 * 24) + costs.other_usd_per_hour
        usd += watts * PUE / 1000 * costs.usd_per_kwh
    return usd


def test_busy_seconds_pay_for_the_whole_device() -> None:
    """What the busy hours are charged is what the owner pays for all of them."""
    price = device_price(COSTS, H200, pue=PUE)
    busy_s = 400 * 3600
    energy = 600 * PUE * 400 * price.usd_per_wh
    assert busy_s * price.usd_per_busy_s + energy == pytest.approx(paid(COSTS, busy_w=600))
    parts = price.usd_per_hour(H200)
    assert parts["idle"] == pytest.approx(
        1.5 * (parts["capital"] + parts["other"]) + 1.5 * H200.idle_w * PUE / 1000 * 0.2
    )


def test_break_even_is_where_both_bills_are_the_same() -> None:
    """At the load that it names, the owner pays what the hosted service asks for the tokens."""
    busy_s, num_tokens, hosted_usd = 100.0, 50_000, 0.2
    even = break_even(
        COSTS, H200, pue=PUE, num_tokens=num_tokens, busy_s=busy_s,
        wh=600 * PUE * busy_s / 3600, hosted_usd=hosted_usd,
    )  # fmt: skip
    assert even.utilisation is not None
    assert even.tokens_per_s == pytest.approx(even.utilisation * num_tokens / busy_s)
    at_even = COSTS.model_copy(update={"utilisation": even.utilisation})
    price = device_price(at_even, H200, pue=PUE)
    own_usd = busy_s * price.usd_per_busy_s + 600 * PUE * busy_s / 3600 * price.usd_per_wh
    assert own_usd == pytest.approx(hosted_usd)


def test_no_load_is_even_with_a_price_below_the_energy() -> None:
    """Where the energy of the work alone costs more, more work does not help."""
    even = break_even(COSTS, H200, pue=PUE, num_tokens=1, busy_s=100.0, wh=1000.0, hosted_usd=0.01)
    assert even.utilisation is None


def test_local_members_are_priced_by_their_hardware_others_by_what_was_typed() -> None:
    """Remote members, and engines set to null, keep the pool file's prices, and say so."""
    typed = Rates(usd_per_input_token=1e-6, usd_per_output_token=2e-6)
    models = {
        name: ModelFacts(name=name, parameters=10**9, remote=name == "hosted", rates=typed)
        for name in ("own", "kept", "hosted")
    }
    economics = EconomicsSettings(device_usd=1000, utilisation=0.5, usd_per_kwh=0.3,
                                  engines={"b": None})  # fmt: skip
    rates = CarbonSettings().rates(
        models, {"own": "a", "kept": "b", "hosted": "c"}, gco2e_per_kwh=100, economics=economics
    )
    assert {name: r.footprint(1, 1).price for name, r in rates.items()} == {
        "own": "hardware", "kept": "typed", "hosted": "typed",
    }  # fmt: skip
    assert rates["kept"].footprint(100, 10).usd == pytest.approx(1.2e-4)
    measured = rates["own"].measured(
        100, 10, wh=2.0, busy_s=3.0, latency_s=0.0, method="measured:rapl"
    )
    price = device_price(economics, find_device("cpu"), pue=1.0)
    assert measured.usd == pytest.approx(3 * price.usd_per_busy_s + 2 * 0.0003)
    assert measured.usd_high - measured.usd == pytest.approx(2 * 0.0003 * 0.73)


@pytest.mark.parametrize(
    ("idle", "expected_wh"), [("excluded", 0.0), ("busy_time", 0.7), ("capacity", 3 * 0.64 / 3600)]
)
def test_idle_energy_follows_the_stated_rule(idle: str, expected_wh: float) -> None:
    """Nobody's; the share that was measured; or the planned idle seconds at idle power."""
    carbon = CarbonSettings.model_validate({"idle": idle})
    economics = EconomicsSettings(device_usd=1, utilisation=0.5, usd_per_kwh=0)
    facts = ModelFacts(name="m", parameters=1, rates=Rates(usd_per_input_token=0,
                                                           usd_per_output_token=0))  # fmt: skip
    rates = carbon.rates({"m": facts}, {"m": "e"}, gco2e_per_kwh=1, economics=economics)["m"]
    cost = rates.measured(
        1, 1, wh=1.0, busy_s=3.0, idle_wh=0.7, latency_s=0.0, method="measured:rapl"
    )
    assert cost.idle_wh == pytest.approx(expected_wh)
    assert cost.wh == 1.0


def test_a_machine_of_several_vcpus_is_so_many_times_one() -> None:
    """Twice the vCPUs take half the seconds, at twice the power: the energy is the same."""
    free = Rates(usd_per_input_token=0, usd_per_output_token=0)
    facts = {"m": ModelFacts(name="m", parameters=10**9, rates=free)}
    one, two = (
        CarbonSettings.model_validate({"hardware": {"count": count}})
        .rates(facts, {"m": "e"}, gco2e_per_kwh=100)["m"]
        .footprint(10, 10)
        for count in (1, 2)
    )
    assert two.busy_s == pytest.approx(one.busy_s / 2)
    assert (two.wh, two.gco2e) == pytest.approx((one.wh, one.gco2e))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"device_usd": math.inf}, "device_usd"),
        ({"device_usd": True}, "device_usd"),
        ({"device_usd": "1200"}, "device_usd"),
        ({"lifetime_years": math.inf}, "lifetime_years"),
        ({"lifetime_years": 1e-300}, "lifetime_years"),
        ({"utilisation": 1e-300}, "utilisation"),
        ({"utilisation": 30}, "utilisation"),
        ({"usd_per_kwh": math.inf}, "usd_per_kwh"),
        ({"engines": {"one": {"device_usd": 1}}}, "engines.one.utilisation"),
        ({"utilization": 0.4}, "utilization"),
    ],
)
def test_costs_that_no_device_has_are_refused(changes: dict[str, Any], key: str) -> None:
    """Neither infinities, nor what would become one, nor what is no number; the key is named."""
    with pytest.raises(ValidationError) as refused:
        EconomicsSettings.model_validate({**COSTS.model_dump(), **changes})
    assert f"{key}: " in explain(refused.value)


@pytest.mark.parametrize(
    ("hardware", "words"),
    [
        ({"idle_w": 10.0, "power_w": 1.0}, "cpu: idle_w 10 is more than power_w 1"),
        ({"idle_w": 1e6}, "is more than power_w"),
        ({"power_w": math.inf}, "should be a finite number"),
        ({"count": True}, "should be a valid integer"),
    ],
)
def test_hardware_that_cannot_be_is_refused(hardware: dict[str, Any], words: str) -> None:
    """A device does not draw more when it rests than when it works."""
    with pytest.raises(ValidationError) as refused:
        CarbonSettings.model_validate({"hardware": hardware})
    assert words in explain(refused.value)
