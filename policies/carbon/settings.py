"""The `carbon:` section of the configuration, what it builds, and a pool priced by it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

from pydantic import Field, model_validator

from policies.base import ModelFacts
from policies.carbon.economics import DeviceCosts, EconomicsSettings, device_price, idle_seconds
from policies.carbon.grid import CachedGrid, GridIntensity, GridReading, ScheduledGrid, StaticGrid
from policies.carbon.llmcarbon import Device, find_device, rates_for
from policies.errors import CarbonError
from policies.footprint import IdleRule, Rates
from policies.kinds import Settings

MeterKind: TypeAlias = Literal["auto", "rapl", "nvml", "cpu-time", "always", "off"]


class DeviceSettings(Settings):
    """`count` devices of the shipped table; figures you have measured replace the table's.

    The table's "cpu" is one vCPU: a machine of eight has `count: 8`. `power_w`, `idle_w` and
    `peak_tflops` are each device's.
    """

    device: str = "cpu"
    count: int = Field(1, ge=1)
    efficiency: float | None = Field(None, gt=0, le=1)
    power_w: float | None = Field(None, gt=0)
    idle_w: float | None = Field(None, ge=0)
    peak_tflops: float | None = Field(None, gt=0)

    def build(self) -> Device:
        """Return the devices as one; `CarbonError` for an unknown name or impossible power."""
        overrides = {
            key: value
            for key, value in self.model_dump(exclude={"device", "count"}).items()
            if value is not None
        }
        device = find_device(self.device)
        if overrides:
            source = f"{device.source}; overridden: {overrides}"
            device = replace(device, **overrides, source=source)
        if device.idle_w > device.power_w:
            raise CarbonError(
                f"{self.device}: idle_w {device.idle_w:g} is more than power_w {device.power_w:g}"
            )
        return device.times(self.count)


class FeedSettings(Settings):
    """A live feed of the Electricity Maps API's shape.

    GET `url`?zone=… with the header `auth-token`, read from the environment variable
    `token_env`, answers JSON with `carbonIntensity` (gCO2e per kWh) and `datetime`. Readings older
    than `max_age_s` are not used; the table's value for the zone is, marked as a fallback.
    """

    url: str
    zone: str
    token_env: str | None = None
    refresh_s: float = Field(300, gt=0)
    max_age_s: float = Field(7200, gt=0)
    timeout_s: float = Field(10, gt=0)


class CarbonSettings(Settings):
    """Where the electricity comes from and what it drives.

    `zone` is a country (DE), WORLD, or a cloud region (gcp:europe-west3); `grid_file` a CSV that
    takes its place; `feed` a live source on top of either. `pue` is the data centre's power usage
    effectiveness (1 for a computer on a desk). `hardware` applies to every engine of this machine
    that `engines` does not name, unless a meter measures: "auto" takes NVML on GPUs and RAPL on
    CPUs where they can be read, "cpu-time" counts seconds of vCPUs at the hardware's power,
    "always" does where "auto" finds nothing to read, "off" always models. `idle` says who bears
    what the hardware draws while it stands idle.
    """

    zone: str = "WORLD"
    grid_file: Path | None = Field(None, strict=False)
    feed: FeedSettings | None = None
    pue: float = Field(1.0, ge=1)
    hardware: DeviceSettings = DeviceSettings()
    engines: dict[str, DeviceSettings] = Field(default_factory=dict)
    meter: MeterKind = "auto"
    idle: IdleRule = "excluded"

    @model_validator(mode="after")
    def _tables_know_it(self) -> CarbonSettings:
        # A mistake shows when the file loads, not at the first request.
        StaticGrid.of_zone(self.zone)
        for settings in (self.hardware, *self.engines.values()):
            settings.build()
        return self

    def grid(self, folder: Path) -> GridIntensity:
        """Return the grid; a `CachedGrid` where there is a feed, for the feed to update.

        `folder` is where a relative `grid_file` starts. Raises `CarbonError` for a bad file.
        """
        grid: GridIntensity = StaticGrid.of_zone(self.zone)
        if self.grid_file is not None:
            grid = ScheduledGrid.read(folder / self.grid_file)
        if self.feed is not None:
            grid = CachedGrid(fallback=grid, max_age_s=self.feed.max_age_s)
        return grid

    def device_of(self, engine: str) -> Device:
        """Return the device that the engine called `engine` runs on."""
        return self.engines.get(engine, self.hardware).build()

    def _device_for(self, facts: ModelFacts, engine: str) -> Device | None:
        """Return what runs a model; None for a remote one whose hardware nobody has stated."""
        return None if facts.remote and engine not in self.engines else self.device_of(engine)

    def rates(
        self,
        models: Mapping[str, ModelFacts],
        engine_of: Mapping[str, str],
        *,
        gco2e_per_kwh: float,
        grid_factor: float = 1.0,
        economics: EconomicsSettings | None = None,
    ) -> dict[str, Rates]:
        """Return every model's rates with energy and carbon filled in, at this grid intensity.

        `engine_of` maps models to the engines that run them. With `economics`, money follows from
        the hardware where it is known.
        """
        found = {}
        for name, facts in models.items():
            engine = engine_of[name]
            device = self._device_for(facts, engine)
            rates = rates_for(
                facts, device, gco2e_per_kwh=gco2e_per_kwh, grid_factor=grid_factor, pue=self.pue
            )
            rates = replace(rates, idle=self.idle)
            costs = economics.of(engine, remote=facts.remote) if economics else None
            found[name] = self._priced(rates, device, costs) if device and costs else rates
        return found

    def _priced(self, rates: Rates, device: Device, costs: DeviceCosts) -> Rates:
        """Return `rates` with the price that follows from what `device` costs."""
        price = device_price(costs, device, pue=self.pue)
        return replace(
            rates,
            usd_per_input_token=0.0,
            usd_per_output_token=0.0,
            usd_per_busy_s=price.usd_per_busy_s,
            usd_per_wh=price.usd_per_wh,
            price="hardware",
            idle_wh_per_busy_s=idle_seconds(costs.utilisation) * device.idle_w * self.pue / 3600,
        )


class LiveModels(Mapping[str, ModelFacts]):
    """A pool's `ModelFacts` by name, repriced whenever the grid's intensity changes.

    Handed to policies in place of a plain dictionary. Between changes the same objects come back,
    so that a policy may cache what it derived from a `Rates` object until it sees another one.
    Thread-safe.
    """

    def __init__(
        self,
        models: Mapping[str, ModelFacts],
        *,
        engine_of: Mapping[str, str],
        settings: CarbonSettings,
        grid: GridIntensity,
        clock: Callable[[], float],
        economics: EconomicsSettings | None = None,
    ) -> None:
        """Price `models`; `engine_of` maps them to engines, `clock` returns Unix time."""
        self._models = dict(models)
        self._engine_of = dict(engine_of)
        self._settings = settings
        self._grid = grid
        self._clock = clock
        self._lock = threading.Lock()
        self._economics = economics
        self._reading: GridReading | None = None
        self._priced: dict[str, ModelFacts] = {}
        self._rates: dict[str, Rates] = {}
        self._refresh()

    def rates(self) -> Mapping[str, Rates]:
        """Return every model's current rates; the same object until the intensity changes."""
        self._refresh()
        return self._rates

    def announced_gco2e_per_kwh(self, then_s: float) -> float | None:
        """Return the intensity announced for a time to come; None where nothing is."""
        return self._grid.announced(then_s)

    def __getitem__(self, name: str) -> ModelFacts:
        self._refresh()
        return self._priced[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    def _refresh(self) -> None:
        reading = self._grid.at(self._clock())
        if self._reading and reading.gco2e_per_kwh == self._reading.gco2e_per_kwh:
            return
        with self._lock:
            rates = self._settings.rates(
                self._models,
                self._engine_of,
                gco2e_per_kwh=reading.gco2e_per_kwh,
                grid_factor=reading.factor,
                economics=self._economics,
            )
            self._priced = {
                name: replace(facts, rates=rates[name]) for name, facts in self._models.items()
            }
            self._rates = rates
            self._reading = reading
