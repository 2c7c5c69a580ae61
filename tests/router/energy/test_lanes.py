"""Attribution by lane-time: every watt-hour goes to exactly one request or to idle."""

import asyncio
import random

import pytest

from models.engines.base import Chunk, EngineStats, GenerationRequest
from models.spec import EngineSpec
from policies.carbon.settings import CarbonSettings, DeviceSettings
from router.energy import LaneMeter, LaneMeters
from router.engines import EngineWorker


class Device:
    """A clock and a meter of a device whose power the test sets."""

    method = "measured:test"

    def __init__(self):
        self.now_s = 0.0
        self.wh = 0.0

    def read_wh(self):
        """Return the counter."""
        return self.wh

    def pass_time(self, seconds, power_w):
        """Let `seconds` pass at `power_w`."""
        self.now_s += seconds
        self.wh += seconds * power_w / 3600

    def lanes(self):
        """Return a meter of this device."""
        return LaneMeter(self, clock=lambda: self.now_s)


def test_lanes_that_run_together_share_the_power():
    """One lane beside three pays a quarter; alone it pays everything."""
    device = Device()
    meter = device.lanes()
    lanes = meter.begin(3)
    device.pass_time(3600, power_w=100)
    lane = meter.begin(1)
    device.pass_time(3600, power_w=80)
    fused = meter.end(lanes)
    device.pass_time(3600, power_w=50)
    single = meter.end(lane)
    assert fused.wh == pytest.approx(100 + 60)
    assert single.wh == pytest.approx(20 + 50)
    assert fused.busy_s == pytest.approx(3600 + 2700)
    assert single.busy_s == pytest.approx(900 + 3600)
    assert fused.method == "measured:test"


def test_energy_while_nothing_runs_is_idle():
    """Idle energy is reported apart and no request pays for it."""
    device = Device()
    meter = device.lanes()
    device.pass_time(3600, power_w=40)
    lane = meter.begin(1)
    device.pass_time(1800, power_w=100)
    assert meter.end(lane).wh == pytest.approx(50)
    device.pass_time(3600, power_w=40)
    assert meter.idle_wh == pytest.approx(80)


def test_idle_energy_is_told_by_busy_time():
    """Each busy second bears the idle energy there has been per busy second, beside its own."""
    device = Device()
    meter = device.lanes()
    device.pass_time(3600, power_w=40)
    lane = meter.begin(1)
    device.pass_time(1800, power_w=100)
    assert meter.end(lane).idle_wh == pytest.approx(40)
    lane = meter.begin(1)
    device.pass_time(1800, power_w=100)
    assert meter.end(lane).idle_wh == pytest.approx(20)


def test_nothing_is_lost_or_counted_twice():
    """Requests plus idle are what the meter read, and busy seconds the time not idle (seed 3)."""
    rng = random.Random(3)
    device = Device()
    meter = device.lanes()
    running, used, busy_s = [], [], 0.0
    for _ in range(500):
        seconds = rng.expovariate(1.0)
        busy_s += seconds if running else 0.0
        device.pass_time(seconds, power_w=rng.uniform(30, 300))
        if running and rng.random() < 0.5:
            used.append(meter.end(running.pop(rng.randrange(len(running)))))
        else:
            running.append(meter.begin(rng.randint(1, 8)))
    used += [meter.end(lanes) for lanes in running]
    assert sum(use.wh for use in used) + meter.idle_wh == pytest.approx(device.wh)
    assert sum(use.busy_s for use in used) == pytest.approx(busy_s)


class Ticking:
    """An engine of which each answer takes `seconds` of a device at 100 W."""

    def __init__(self, device, seconds):
        self._device = device
        self._seconds = seconds

    async def generate(self, request):
        """Answer with nothing, in time."""
        self._device.pass_time(self._seconds, power_w=100)
        yield Chunk(text="", tokens=(), finish_reason="stop")

    def check_health(self):
        """Be well."""

    def stats(self):
        """Return a snapshot."""
        return EngineStats()


def spec(name, kind="fake"):
    """Return an engine's specification."""
    return EngineSpec(name=name, kind=kind, device="cpu")


def test_engines_of_one_process_share_what_they_run_on():
    """A device is read once for all engines on it; hardware of its own is another device."""
    alone = {"b": DeviceSettings(count=4)}
    meters = LaneMeters(CarbonSettings(meter="cpu-time", engines=alone))
    assert meters.of(spec("a")) is meters.of(spec("c"))
    assert meters.of(spec("a")) is not meters.of(spec("b"))
    assert meters.of(spec("far", kind="remote")) is None
    assert LaneMeters(CarbonSettings(meter="off")).of(spec("a")) is None


def test_idle_energy_of_a_shared_device_is_told_once():
    """Engines share a device's idle energy alike before an answer, and by busy time after it."""
    device = Device()
    meter = device.lanes()
    meter.num_engines = 2
    workers = [EngineWorker(Ticking(device, seconds), meter) for seconds in (900, 2700)]
    device.pass_time(3600, power_w=40)

    async def told():
        return [(await worker.stats()).idle_wh for worker in workers]

    async def answer():
        for worker in workers:
            await worker.complete(
                GenerationRequest(request_id="r", prompt_tokens=(1,), members=("m",))
            )

    assert asyncio.run(told()) == pytest.approx([20, 20])
    asyncio.run(answer())
    assert asyncio.run(told()) == pytest.approx([10, 30])
