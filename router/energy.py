"""Energy measured at the engines and attributed to requests, by lane-time.

A meter counts the energy of the device that an engine runs on: NVML an NVIDIA GPU's, RAPL that of
CPU packages and their memory; where neither can be read, seconds of vCPUs at a stated power. A lane
is one member answering one request. At every moment the device's power is shared equally by the
lanes that run, so a request pays Σ lanes / all lanes of what is drawn while it runs. What is drawn
while no lane runs is idle, and told beside, by the rule of `carbon.idle`. Nothing is lost or
counted twice: the requests' energy, without the data centre's PUE, plus the idle energy is what the
meter read.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from models.engines.base import Chunk
from models.spec import EngineSpec
from policies.carbon.llmcarbon import Device
from policies.carbon.settings import CarbonSettings, DeviceSettings, MeterKind
from policies.footprint import CPU_TIME, NVML, RAPL

logger = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")
_MILLIJOULES_PER_WH = 3.6e6
_MICROJOULES_PER_WH = 3.6e9


class MeterError(RuntimeError):
    """A meter that this machine lacks or does not let us read; the message says what would help."""


class Meter(Protocol):
    """Counts the energy of the device an engine runs on, other programs' share included."""

    @property
    def method(self) -> str:
        """How it measures, by a name of `policies.footprint.METHODS`."""
        ...

    def read_wh(self) -> float:
        """Return watt-hours since the meter was opened; never falls. Raises `MeterError`."""
        ...


class NvmlMeter:
    """Reads a GPU's total energy consumption (Volta and later); the whole board is counted."""

    method = NVML.name

    def __init__(self, device: str = "0", *, nvml: Any = None) -> None:  # noqa: ANN401 - a module
        """Open the GPU with this index or UUID; `nvml` replaces the pynvml module.

        Raises `MeterError` without the nvidia-ml-py package, a driver, or such a counter.
        """
        self._nvml = nvml if nvml is not None else _load_nvml()
        try:
            self._nvml.nvmlInit()
            self._handle = (
                self._nvml.nvmlDeviceGetHandleByIndex(int(device))
                if device.isdigit()
                else self._nvml.nvmlDeviceGetHandleByUUID(device)
            )
            self._start_mj = self._energy_mj()
        except self._nvml.NVMLError as error:
            raise MeterError(f"GPU {device} has no energy counter: {error}") from None

    def read_wh(self) -> float:
        """Return watt-hours since the meter was opened."""
        try:
            return (self._energy_mj() - self._start_mj) / _MILLIJOULES_PER_WH
        except self._nvml.NVMLError as error:
            raise MeterError(f"the GPU's energy counter cannot be read: {error}") from None

    def _energy_mj(self) -> int:
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))


def visible_device() -> str:
    """Return this process's first GPU, which CUDA_VISIBLE_DEVICES may have renumbered."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip() or "0"


def _load_nvml() -> Any:  # noqa: ANN401 - an optional module without types
    try:
        return import_module("pynvml")
    except ImportError:
        raise MeterError(
            "measuring a GPU's energy needs the package nvidia-ml-py: pip install nvidia-ml-py"
        ) from None


class RaplMeter:
    """Sums the package and DRAM counters of all sockets; counters that wrap are unwrapped.

    Packages cover the whole socket, so what other programs burn is counted too. A counter must be
    read at least once per wrap (minutes at full load).
    """

    method = RAPL.name

    def __init__(self, root: Path = POWERCAP) -> None:
        """Open every package below `root`; raises `MeterError` if there is none to read."""
        zones = [
            zone
            for zone in sorted(root.glob("intel-rapl:*"))
            if _read(zone / "name").startswith(("package", "dram"))
        ]
        if not zones:
            raise MeterError(f"{root} holds no RAPL package; this machine has no such meter")
        self._counters = [_Counter(zone) for zone in zones]

    def read_wh(self) -> float:
        """Return watt-hours since the meter was opened."""
        return sum(counter.advance() for counter in self._counters) / _MICROJOULES_PER_WH


class _Counter:
    """One zone's microjoules since it was opened."""

    def __init__(self, zone: Path) -> None:
        self._file = zone / "energy_uj"
        self._range_uj = int(_read(zone / "max_energy_range_uj"))
        self._last_uj = int(_read(self._file))
        self._total_uj = 0

    def advance(self) -> int:
        now_uj = int(_read(self._file))
        step_uj = now_uj - self._last_uj
        if step_uj < 0:
            step_uj += self._range_uj
        self._last_uj = now_uj
        self._total_uj += step_uj
        return self._total_uj


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except PermissionError:
        raise MeterError(
            f"{file} may not be read; allow it with `chmod a+r {file}` (Linux keeps it to root)"
        ) from None
    except OSError as error:
        raise MeterError(f"{file}: {error.strerror}") from None


class CpuTimeMeter:
    """Models a CPU's energy from this process's seconds on its vCPUs.

    The device draws its idle power all the time, and up to its full power by the share of its vCPUs
    that this process keeps busy; what other programs do is not seen. `clock` and `cpu_clock` count
    seconds: those of the wall, and those that all threads together had a vCPU.
    """

    method = CPU_TIME.name

    def __init__(
        self,
        device: Device,
        *,
        num_vcpus: int,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        """Model `device`, which has `num_vcpus` vCPUs."""
        self._idle_w = device.idle_w
        self._w_per_vcpu = (device.power_w - device.idle_w) / num_vcpus
        self._clock, self._cpu_clock = clock, cpu_clock
        self._start_s, self._cpu_start_s = clock(), cpu_clock()

    def read_wh(self) -> float:
        """Return watt-hours since the meter was opened."""
        wall_s = self._clock() - self._start_s
        cpu_s = self._cpu_clock() - self._cpu_start_s
        return (self._idle_w * wall_s + self._w_per_vcpu * cpu_s) / 3600


def open_meter(
    kind: MeterKind,
    *,
    on_gpu: bool,
    device: Device | None = None,
    num_vcpus: int = 1,
    powercap: Path = POWERCAP,
) -> Meter | None:
    """Open the meter that `kind` names; "auto" takes NVML for GPUs, RAPL for CPUs, or none.

    Where "auto" finds nothing to read, energy is modelled instead, and the log says why; "always"
    then counts the time of `device`, a CPU of `num_vcpus`. Raises `MeterError` where a meter was
    asked for by name and cannot be read.
    """
    if kind == "off":
        return None
    try:
        if kind == "nvml" or (kind in ("auto", "always") and on_gpu):
            return NvmlMeter(visible_device())
        if kind != "cpu-time":
            return RaplMeter(powercap)
    except MeterError as error:
        if kind not in ("auto", "always"):
            raise
        logger.info("energy is modelled, not measured: %s", error)
        if kind == "auto" or on_gpu:
            return None
    assert device is not None
    return CpuTimeMeter(device, num_vcpus=num_vcpus)


class LaneMeters:
    """A lane meter per device of this process: what engines share is read and attributed once.

    There is one set of RAPL counters, and one GPU that a process sees first; by CPU time engines
    run on one device unless `carbon.engines` gives them hardware of their own.
    """

    def __init__(self, carbon: CarbonSettings) -> None:
        """Attribute energy as `carbon` says."""
        self._carbon = carbon
        self._made: dict[tuple[str, DeviceSettings | None], LaneMeter] = {}

    def of(self, spec: EngineSpec) -> LaneMeter | None:
        """Return what attributes the energy of the engine that `spec` describes; None to model it.

        To be called when the engine has been made: only then is its tensor library loaded. What a
        remote engine draws, no meter of this machine sees.
        """
        if spec.kind == "remote":
            return None
        torch = sys.modules.get("torch")
        on_gpu = spec.device.startswith("cuda") or (
            spec.device == "auto" and torch is not None and torch.cuda.is_available()
        )
        settings = self._carbon.engines.get(spec.name, self._carbon.hardware)
        meter = open_meter(
            self._carbon.meter, on_gpu=on_gpu, device=settings.build(), num_vcpus=settings.count
        )
        if meter is None:
            return None
        device = (meter.method, settings if meter.method == CPU_TIME.name else None)
        if device not in self._made:
            self._made[device] = LaneMeter(meter, clock=time.monotonic, pue=self._carbon.pue)
        self._made[device].num_engines += 1
        return self._made[device]


@dataclass(frozen=True, kw_only=True)
class EnergyUse:
    """What one request used: watt-hours, its share of the device's busy seconds, and how known.

    `idle_wh` is what its busy seconds bear of all idle energy so far, shared by busy time.
    """

    wh: float
    busy_s: float
    idle_wh: float
    method: str


@dataclass(frozen=True, kw_only=True)
class Lanes:
    """A request's lanes while they run: how many, and what one had used when they began."""

    num: int
    wh_per_lane: float
    s_per_lane: float


class LaneMeter:
    """Attributes one device's energy to the lanes of all engines that share it.

    Called on their event loop, not thread-safe. Constant work per request: it integrates energy and
    time per lane, and a request takes the difference between its end and its begin (the virtual
    time of fair queueing).
    """

    def __init__(self, meter: Meter, *, clock: Callable[[], float], pue: float = 1.0) -> None:
        """Attribute what `meter` reads; requests also pay for cooling, by the PUE."""
        self.num_engines = 0
        self._meter = meter
        self._pue = pue
        self._clock = clock
        self._num_lanes = 0
        self._wh_per_lane = 0.0
        self._s_per_lane = 0.0
        self._idle_wh = 0.0
        self._busy_s = 0.0
        self._answered_s = 0.0
        self._last_wh = meter.read_wh()
        self._last_s = clock()

    @property
    def idle_wh(self) -> float:
        """Watt-hours drawn while no request ran."""
        self._settle()
        return self._idle_wh

    def idle_share_wh(self, busy_s: float) -> float:
        """Return the part of `idle_wh` of an engine whose ended requests took `busy_s`.

        Engines share it by busy time, or alike before any request has ended.
        """
        if self._answered_s:
            return self.idle_wh * busy_s / self._answered_s
        return self.idle_wh / max(1, self.num_engines)

    def begin(self, num_lanes: int) -> Lanes:
        """Note that a request starts on `num_lanes` members, and return what `end` is to get."""
        self._settle()
        self._num_lanes += num_lanes
        return Lanes(num=num_lanes, wh_per_lane=self._wh_per_lane, s_per_lane=self._s_per_lane)

    def end(self, lanes: Lanes) -> EnergyUse:
        """Note that a request ended, however it did, and return what it used."""
        self._settle()
        self._num_lanes -= lanes.num
        busy_s = lanes.num * (self._s_per_lane - lanes.s_per_lane)
        self._answered_s += busy_s
        return EnergyUse(
            wh=lanes.num * (self._wh_per_lane - lanes.wh_per_lane) * self._pue,
            busy_s=busy_s,
            idle_wh=busy_s * self._idle_wh / self._busy_s * self._pue if self._busy_s else 0.0,
            method=self._meter.method,
        )

    def _settle(self) -> None:
        wh, now_s = self._meter.read_wh(), self._clock()
        step_wh, step_s = wh - self._last_wh, now_s - self._last_s
        self._last_wh, self._last_s = wh, now_s
        if self._num_lanes:
            self._wh_per_lane += step_wh / self._num_lanes
            self._s_per_lane += step_s / self._num_lanes
            self._busy_s += step_s
        else:
            self._idle_wh += step_wh


@dataclass(frozen=True, kw_only=True, slots=True)
class MeteredChunk(Chunk):
    """A chunk that also says what the whole answer used."""

    energy: EnergyUse


def metered(chunk: Chunk, energy: EnergyUse) -> MeteredChunk:
    """Return `chunk` with what the answer used."""
    return MeteredChunk(**{f.name: getattr(chunk, f.name) for f in fields(Chunk)}, energy=energy)


def energy_of(chunk: Chunk) -> EnergyUse | None:
    """Return what the answer used, if this is its last chunk and somebody measured it."""
    return chunk.energy if isinstance(chunk, MeteredChunk) else None
