"""A price from hardware: what a busy second of a device costs, idle ones included.

The `economics:` section of the configuration. A device is paid for whether it works or not, so a
busy second bears the idle ones that the planned utilisation u leaves, (1 - u)/u of them, with the
power that they draw. What a member's token costs is then its seconds and its energy, as they were
measured:

    USD = busy seconds · (capital + other + idle) + watt-hours · price of energy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import Field

from policies.carbon.llmcarbon import HOURS_PER_YEAR, Device
from policies.kinds import Settings


class DeviceCosts(Settings):
    """What one device costs: the GPU with its share of the host, or the machine without one.

    `utilisation` is the share of its life in which it works. `other_usd_per_hour` is what else its
    owner pays while it stands there: hosting, people, network. For a rented device that is the
    whole price, and `device_usd` 0.
    """

    device_usd: float = Field(ge=0, le=1e9)
    lifetime_years: float = Field(5, ge=0.01, le=1000)
    utilisation: float = Field(ge=1e-4, le=1)
    usd_per_kwh: float = Field(ge=0, le=1e3)
    other_usd_per_hour: float = Field(0, ge=0, le=1e6)


class EconomicsSettings(DeviceCosts):
    """The costs of every engine's device, but for those that `engines` names.

    Members of an engine that is null there keep the prices typed in the pool file, as those of
    remote engines do that are not named.
    """

    engines: Mapping[str, DeviceCosts | None] = Field(default_factory=dict)

    def of(self, engine: str, *, remote: bool) -> DeviceCosts | None:
        """Return what the device of `engine` costs; None where typed prices hold."""
        return self.engines.get(engine, None if remote else self)


@dataclass(frozen=True, kw_only=True)
class DevicePrice:
    """USD per busy second of a device by what they pay for, and per watt-hour of busy energy.

    `idle_usd_per_s` is all that is paid for the idle seconds behind a busy one, energy included.
    """

    capital_usd_per_s: float
    other_usd_per_s: float
    idle_usd_per_s: float
    usd_per_wh: float
    pue: float

    @property
    def usd_per_busy_s(self) -> float:
        """All but the energy of the busy second itself."""
        return self.capital_usd_per_s + self.other_usd_per_s + self.idle_usd_per_s

    def usd_per_hour(self, device: Device) -> dict[str, float]:
        """Return what a busy hour costs by what it pays for, at the power that `device` states."""
        return {
            "capital": 3600 * self.capital_usd_per_s,
            "other": 3600 * self.other_usd_per_s,
            "idle": 3600 * self.idle_usd_per_s,
            "energy": device.power_w * self.pue * self.usd_per_wh,
        }


def device_price(costs: DeviceCosts, device: Device, *, pue: float) -> DevicePrice:
    """Return what a busy second costs on `device`, whose idle power counts too, by the PUE."""
    capital = costs.device_usd / (costs.lifetime_years * HOURS_PER_YEAR * 3600)
    other = costs.other_usd_per_hour / 3600
    usd_per_wh = costs.usd_per_kwh / 1000
    idle_s = idle_seconds(costs.utilisation)
    return DevicePrice(
        capital_usd_per_s=capital,
        other_usd_per_s=other,
        idle_usd_per_s=idle_s * (capital + other + device.idle_w * pue / 3600 * usd_per_wh),
        usd_per_wh=usd_per_wh,
        pue=pue,
    )


def idle_seconds(utilisation: float) -> float:
    """Return the idle seconds behind each busy one."""
    return (1 - utilisation) / utilisation


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """Where a device costs what a hosted service would ask for the same tokens.

    `utilisation` is that load as a share of the device's time, `tokens_per_s` in tokens (read and
    written). More than 1 is out of reach. None: at no load, since energy alone costs as much.
    """

    utilisation: float | None
    tokens_per_s: float | None


def break_even(
    costs: DeviceCosts,
    device: Device,
    *,
    pue: float,
    num_tokens: int,
    busy_s: float,
    wh: float,
    hosted_usd: float,
) -> BreakEven:
    """Return the load at which `num_tokens`, which took `busy_s` and `wh`, cost `hosted_usd`.

    At utilisation u a busy second costs F/u + m: F what the device costs per second standing idle,
    m what its work adds. It is even where that is the hosted price per busy second.
    """
    standing = device_price(costs.model_copy(update={"utilisation": 1.0}), device, pue=pue)
    idle = device.idle_w * pue / 3600 * standing.usd_per_wh
    per_busy_s = hosted_usd / busy_s
    margin = per_busy_s - (wh / busy_s * standing.usd_per_wh - idle)
    if margin <= 0:
        return BreakEven(utilisation=None, tokens_per_s=None)
    utilisation = (standing.usd_per_busy_s + idle) / margin
    return BreakEven(utilisation=utilisation, tokens_per_s=utilisation * num_tokens / busy_s)
