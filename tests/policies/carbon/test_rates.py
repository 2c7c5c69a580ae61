"""Modelled rates, and the configuration they are built from."""

from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from policies.base import ModelFacts
from policies.carbon.grid import CachedGrid
from policies.carbon.llmcarbon import find_device, rates_for
from policies.carbon.settings import CarbonSettings
from policies.footprint import Footprint, Rates, estimate
from policies.plan import Answer

PRICE = Rates(usd_per_input_token=1e-6, usd_per_output_token=2e-6)


def facts(name, parameters):
    """Return a model of some size."""
    return ModelFacts(name=name, parameters=parameters, rates=PRICE)


def test_a_tokens_energy_follows_llmcarbon():
    """2N FLOPs at the reached FLOP/s, times power, PUE and intensity; plus the device's making."""
    device = find_device("h200")
    rates = rates_for(facts("m", 8_000_000_000), device, gco2e_per_kwh=400, pue=1.2)
    cost = rates.footprint(100, 200)
    busy_s = 300 * 1.6e10 / (989e12 * 0.35)
    assert cost.flops == pytest.approx(300 * 1.6e10)
    assert cost.busy_s == pytest.approx(busy_s)
    assert cost.latency_s == pytest.approx(busy_s)
    assert cost.wh == pytest.approx(busy_s * 700 * 1.2 / 3600)
    assert cost.embodied_gco2e == pytest.approx(busy_s * device.embodied_gco2e_per_s)
    assert cost.gco2e == pytest.approx(cost.wh * 0.4 + cost.embodied_gco2e)
    assert cost.usd == pytest.approx(100e-6 + 400e-6)
    assert cost.method == "modelled:llmcarbon"


def test_a_model_of_unknown_size_keeps_its_rates():
    """Nothing is claimed about its energy, and its method says so."""
    rates = rates_for(facts("remote", None), find_device("cpu"), gco2e_per_kwh=400, pue=1.2)
    assert rates == replace(PRICE, method="unknown")
    assert rates.footprint(10, 10).to_json()["method"] == "unknown"


def test_a_remote_model_is_modelled_only_on_stated_hardware():
    """Its size and hardware come from the user, and the method says that; without either: none."""
    hosted = {"hosted": replace(facts("hosted", 1_000_000), remote=True)}
    here = CarbonSettings(hardware={"device": "cpu"})
    stated = CarbonSettings(engines={"there": {"device": "cpu"}})
    known = stated.rates(hosted, {"hosted": "there"}, gco2e_per_kwh=400)["hosted"]
    unknown = here.rates(hosted, {"hosted": "there"}, gco2e_per_kwh=400)["hosted"]
    assert (known.method, unknown.method) == ("modelled:stated", "unknown")
    assert known.wh_per_output_token > 0 == unknown.wh_per_output_token


def test_a_measurement_replaces_the_models_energy():
    """Measured Wh and device seconds set energy and both kinds of carbon; prices stay."""
    rates = rates_for(facts("m", 10**9), find_device("cpu"), gco2e_per_kwh=500, pue=1.0)
    cost = rates.measured(10, 20, wh=0.2, busy_s=3.0, latency_s=4.0, method="measured:rapl")
    assert cost.wh == 0.2
    assert cost.gco2e == pytest.approx(0.1 + 3.0 * rates.embodied_gco2e_per_s)
    assert (cost.latency_s, cost.method) == (4.0, "measured:rapl")
    assert cost.usd == rates.footprint(10, 20).usd
    assert cost.idle_wh == 0.0


def test_methods_join_when_engines_measure_differently():
    """A plan across a metered and a modelled engine names both methods, once each."""
    both = Footprint(method="measured:nvml").then(Footprint(method="modelled:llmcarbon"))
    assert both.method == "measured:nvml+modelled:llmcarbon"
    assert both.then(both).method == both.method
    assert Footprint().then(both).method == both.method


def test_fusing_doubles_the_energy_of_two_equal_members():
    """Each member reads and writes every token."""
    rates = rates_for(facts("m", 10**9), find_device("cpu"), gco2e_per_kwh=500, pue=1.0)
    table = {"a": rates, "b": rates}
    one = estimate(Answer(members=("a",)), table, prompt_tokens=5, output_tokens=5)
    two = estimate(Answer(members=("a", "b")), table, prompt_tokens=5, output_tokens=5)
    for unit in ("wh", "gco2e", "embodied_gco2e", "flops", "busy_s", "usd"):
        assert getattr(two, unit) == pytest.approx(2 * getattr(one, unit))


def test_settings_build_rates_for_each_engines_device():
    """An engine named in the file runs on its own device, with its own measured figures."""
    settings = CarbonSettings.model_validate(
        {
            "zone": "FR",
            "pue": 1.5,
            "hardware": {"device": "cpu"},
            "engines": {"gpu": {"device": "h200", "efficiency": 0.1, "power_w": 500}},
        }
    )
    models = {"small": facts("small", 10**8), "large": facts("large", 10**9)}
    rates = settings.rates(models, {"small": "local", "large": "gpu"}, gco2e_per_kwh=56.0)
    assert rates["large"].busy_s_per_token == pytest.approx(2e9 / (989e12 * 0.1))
    assert rates["large"].wh_per_output_token == pytest.approx(2e9 / 989e11 * 500 * 1.5 / 3600)
    assert rates["small"].busy_s_per_token == pytest.approx(2e8 / (0.07e12 * 0.3))
    assert settings.grid(Path()).at(0).source == "table:FR"
    assert "overridden" in settings.device_of("gpu").source


def test_a_feed_sits_on_top_of_a_grid_file(tmp_path):
    """Until the feed reports, the file answers, marked as a fallback."""
    (tmp_path / "grid.csv").write_text("hour,gco2e_per_kwh\n0,123\n")
    settings = CarbonSettings.model_validate(
        {"grid_file": "grid.csv", "feed": {"url": "http://localhost/v3", "zone": "DE"}}
    )
    grid = settings.grid(tmp_path)
    assert isinstance(grid, CachedGrid)
    assert grid.at(0).gco2e_per_kwh == 123
    assert grid.at(0).source == "fallback:grid.csv"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"zoned": "DE"}, "Extra inputs"),
        ({"zone": "Atlantis"}, "ISO country codes"),
        ({"pue": 0.9}, "greater than or equal to 1"),
        ({"hardware": {"device": "abacus"}}, "allowed are a100, cpu, h100"),
        ({"engines": {"x": {"device": "abacus"}}}, "'abacus' is unknown"),
    ],
)
def test_a_bad_carbon_section_is_refused_when_it_loads(section, message):
    """Unknown keys, zones and devices are named at start, not at the first request."""
    with pytest.raises(ValidationError, match=message):
        CarbonSettings.model_validate(section)
