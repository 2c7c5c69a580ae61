"""LLMCarbon: time, energy and carbon of a training run or of inference (Faiz et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from policies.carbon.hardware import HOURS_PER_YEAR, Device

DAYS_PER_YEAR = HOURS_PER_YEAR / 24


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

    @property
    def tco2e(self) -> float:
        """Operational plus embodied carbon (eq. 5)."""
        return self.operational_tco2e + self.embodied_tco2e


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


def embodied_tco2e(
    parts_kgco2e: dict[str, tuple[float, int]], *, days: float, lifetime_years: float
) -> float:
    """Return the embodied carbon of `days` of use of some parts, in tonnes (eq. 4, 20-21).

    `parts_kgco2e` maps a part's name to its (kg CO2e each, count).
    """
    total_kg = sum(each * count for each, count in parts_kgco2e.values())
    return total_kg * days / (lifetime_years * DAYS_PER_YEAR) / 1000


@dataclass(frozen=True, kw_only=True)
class CarbonLaw:
    """CO2eq = (K1 + K2)·N·D: linear in parameters and tokens (eq. 5, 6 and 24).

    K1 is operational, K2 embodied, both in gCO2e per parameter and token.
    """

    K1: float
    K2: float

    @classmethod
    def of(cls, device: Device, *, pue: float, gco2e_per_kwh: float) -> CarbonLaw:
        """Return the law of training (6·N·D) on `device`."""
        seconds = training_flops(1, 1) / device.flops_per_s
        return cls(
            K1=seconds * device.power_w / 3600 * pue * gco2e_per_kwh / 1000,
            K2=seconds * device.embodied_gco2e_per_s,
        )

    def predict(self, parameters: float, tokens: float) -> float:
        """Return grams of CO2e for training `parameters` on `tokens`."""
        return (self.K1 + self.K2) * parameters * tokens

    def tokens_for(self, parameters: float, gco2e: float) -> float:
        """Return the tokens that `gco2e` pays for, the inverse of `predict`."""
        return gco2e / ((self.K1 + self.K2) * parameters)
