"""Attributes a device's energy to the requests that keep it busy, by lane-time.

A lane is one member answering one request. At every moment the device's power is shared equally by
the lanes that run, so a request pays Σ lanes / all lanes of what is drawn while it runs. What is
drawn while no lane runs is idle and belongs to no request. Nothing is lost or counted twice: the
requests' energy, without the data centre's PUE, plus the idle energy is what the meter read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from router.energy.base import Meter


@dataclass(frozen=True, kw_only=True)
class EnergyUse:
    """What one request used: watt-hours, its share of the device's busy seconds, and how known."""

    wh: float
    busy_s: float
    method: str


@dataclass(frozen=True, kw_only=True)
class _Running:
    lanes: int
    wh_per_lane: float
    s_per_lane: float


class LaneMeter:
    """Attributes one engine's energy. Called on the engine's event loop, not thread-safe.

    Constant work per request: it integrates energy and time per lane, and a request takes the
    difference between its end and its begin (the virtual time of fair queueing).
    """

    def __init__(self, meter: Meter, *, clock: Callable[[], float], pue: float = 1.0) -> None:
        """Attribute what `meter` reads; requests also pay for cooling, by the PUE."""
        self._meter = meter
        self._pue = pue
        self._clock = clock
        self._running: dict[str, _Running] = {}
        self._num_lanes = 0
        self._wh_per_lane = 0.0
        self._s_per_lane = 0.0
        self._idle_wh = 0.0
        self._last_wh = meter.read_wh()
        self._last_s = clock()

    @property
    def idle_wh(self) -> float:
        """Watt-hours drawn while no request ran."""
        self._settle()
        return self._idle_wh

    def begin(self, request_id: str, *, lanes: int) -> None:
        """Note that a request starts on `lanes` members."""
        self._settle()
        self._num_lanes += lanes
        self._running[request_id] = _Running(
            lanes=lanes, wh_per_lane=self._wh_per_lane, s_per_lane=self._s_per_lane
        )

    def end(self, request_id: str) -> EnergyUse:
        """Note that a request ended, however it did, and return what it used."""
        self._settle()
        began = self._running.pop(request_id)
        self._num_lanes -= began.lanes
        return EnergyUse(
            wh=began.lanes * (self._wh_per_lane - began.wh_per_lane) * self._pue,
            busy_s=began.lanes * (self._s_per_lane - began.s_per_lane),
            method=self._meter.method,
        )

    def _settle(self) -> None:
        wh, now_s = self._meter.read_wh(), self._clock()
        step_wh, step_s = wh - self._last_wh, now_s - self._last_s
        self._last_wh, self._last_s = wh, now_s
        if self._num_lanes:
            self._wh_per_lane += step_wh / self._num_lanes
            self._s_per_lane += step_s / self._num_lanes
        else:
            self._idle_wh += step_wh
