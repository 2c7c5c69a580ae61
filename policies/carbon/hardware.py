"""Devices: what they compute, draw and cost to make, from `policies/data/hardware`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from policies.errors import CarbonError

DEVICES_FILE = Path(__file__).parent.parent / "data" / "hardware" / "devices.yaml"
HOURS_PER_YEAR = 365 * 24


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator or vCPU.

    `peak_tflops` is dense; `efficiency` the share of it that is reached; `power_w` the average
    draw while busy. `embodied_kgco2e` is its own die plus its share of the host, spread over
    `lifetime_years` of use.
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


def find_device(name: str) -> Device:
    """Return the device called `name`; `CarbonError` lists the ones there are."""
    devices = load_devices()
    if name not in devices:
        raise CarbonError(
            f"hardware: {name!r} is unknown; allowed are {', '.join(sorted(devices))}"
        )
    return devices[name]


@cache
def load_devices(file: Path = DEVICES_FILE) -> dict[str, Device]:
    """Read the device table."""
    data: dict[str, Any] = yaml.safe_load(file.read_text())
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
