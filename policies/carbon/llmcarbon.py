"""LLMCarbon: devices, and the time, energy and carbon of running models on them.

Faiz et al. 2024; Sengupta et al. 2025. What devices compute, draw and cost to make stands in
`policies/data/hardware`. A model's rates are this estimate where nobody has measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from policies.base import ModelFacts
from policies.errors import CarbonError
from policies.footprint import LLMCARBON, STATED, UNKNOWN, Rates

DEVICES_FILE = Path(__file__).parent.parent / "data" / "hardware" / "devices.yaml"
HOURS_PER_YEAR = 365 * 24


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator or vCPU.

    `peak_tflops` is dense; `efficiency` the share of it that is reached; `power_w` the average
    draw while busy, `idle_w` that while idle. `embodied_kgco2e` is its own die plus its share of
    the host, spread over `lifetime_years` of use.
    """

    name: str
    description: str
    peak_tflops: float
    efficiency: float
    power_w: float
    idle_w: float
    embodied_kgco2e: float
    lifetime_years: float
    source: str

    @property
    def flops_per_s(self) -> float:
        """FLOP/s that are reached."""
        return self.peak_tflops * 1e12 * self.efficiency

    @property
    def embodied_gco2e_per_s(self) -> float:
        """Grams of embodied CO2e per second of use: Σ area·CPA / lifetime (eq. 20-21)."""
        return self.embodied_kgco2e * 1000 / (self.lifetime_years * HOURS_PER_YEAR * 3600)

    def times(self, count: int) -> Device:
        """Return `count` of these as one device."""
        if count == 1:
            return self
        return replace(
            self,
            name=f"{count} × {self.name}",
            peak_tflops=count * self.peak_tflops,
            power_w=count * self.power_w,
            idle_w=count * self.idle_w,
            embodied_kgco2e=count * self.embodied_kgco2e,
        )


def find_device(name: str) -> Device:
    """Return the device called `name`; `CarbonError` lists the ones there are."""
    devices = load_devices()
    if name not in devices:
        raise CarbonError(
            f"hardware: {name!r} is unknown; allowed are {', '.join(sorted(devices))}"
        )
    return devices[name]


@cache
def load_devices() -> dict[str, Device]:
    """Read the device table."""
    data: dict[str, Any] = yaml.safe_load(DEVICES_FILE.read_text())
    host_kgco2e = sum(data["host"].values())
    return {
        name: Device(
            name=name,
            description=row["description"],
            peak_tflops=row["peak_tflops"],
            efficiency=row["efficiency"],
            power_w=row["power_w"],
            idle_w=row["idle_w"],
            embodied_kgco2e=row["die_cm2"] * row["cpa_kgco2e_per_cm2"]
            + row["host_share"] * host_kgco2e,
            lifetime_years=data["lifetime_years"],
            source=row["source"],
        )
        for name, row in data["devices"].items()
    }


def training_flops(parameters: float, tokens: float) -> float:
    """Return 6·N·D (Sengupta et al. 2025, eq. 14)."""
    return 6 * parameters * tokens


def inference_flops(parameters: float, tokens: float) -> float:
    """Return 2·N·D (Sengupta et al. 2025, eq. 15)."""
    return 2 * parameters * tokens


@dataclass(frozen=True, kw_only=True)
class TrainingCarbon:
    """A run's time, energy and carbon. Operational and embodied carbon in tonnes CO2e."""

    device_hours: float
    days: float
    mwh: float
    operational_tco2e: float
    embodied_tco2e: float


def run_carbon(
    flops: float,
    device: Device,
    *,
    num_devices: int,
    pue: float,
    gco2e_per_kwh: float,
) -> TrainingCarbon:
    """Return what `flops` cost on `num_devices` of `device`.

    t = FLOPs / (n·peak·eff); energy = average power·n·t·PUE; carbon = energy·intensity (eq. 3,
    16-19); embodied = Σ t·area·CPA / lifetime (eq. 4, 20-21). Power is the *average* draw, so it
    already holds the paper's factor for how busy the device is.
    """
    hours = flops / (num_devices * device.flops_per_s) / 3600
    device_hours = hours * num_devices
    mwh = device.power_w * device_hours * pue / 1e6
    return TrainingCarbon(
        device_hours=device_hours,
        days=hours / 24,
        mwh=mwh,
        operational_tco2e=mwh * gco2e_per_kwh / 1000,
        embodied_tco2e=device.embodied_gco2e_per_s * device_hours * 3600 / 1e6,
    )


def rates_for(
    facts: ModelFacts,
    device: Device | None,
    *,
    gco2e_per_kwh: float,
    pue: float,
    grid_factor: float = 1.0,
) -> Rates:
    """Return `facts.rates` with energy and carbon per token filled in.

    2N FLOPs per token at the FLOP/s that `device` reaches give busy seconds; times its average
    power and the PUE, watt-hours; times the grid's intensity, operational carbon; busy seconds over
    the device's lifetime give the embodied part. A token read and one written cost the same FLOPs;
    that decoding is slower per FLOP than reading is not modelled (measure it, or lower the device's
    efficiency). Where the rates say nothing of latency, busy seconds are the least it can be. Idle
    time is not counted. A model whose size or hardware nobody knows keeps its
    rates, and its method says "unknown".
    """
    if facts.parameters is None or device is None:
        return replace(facts.rates, method=UNKNOWN.name)
    flops = inference_flops(facts.parameters, 1)
    busy_s = flops / device.flops_per_s
    wh = busy_s * device.power_w * pue / 3600
    return replace(
        facts.rates,
        wh_per_input_token=wh,
        wh_per_output_token=wh,
        gco2e_per_wh=gco2e_per_kwh / 1000,
        grid_factor=grid_factor,
        s_per_input_token=facts.rates.s_per_input_token or busy_s,
        s_per_output_token=facts.rates.s_per_output_token or busy_s,
        flops_per_token=flops,
        busy_s_per_token=busy_s,
        embodied_gco2e_per_s=device.embodied_gco2e_per_s,
        method=STATED.name if facts.remote else LLMCARBON.name,
    )
