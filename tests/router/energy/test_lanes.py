"""Attribution by lane-time: every watt-hour goes to exactly one request or to idle."""

import random

import pytest

from router.energy import LaneMeter


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
    meter.begin("fused", lanes=3)
    device.pass_time(3600, power_w=100)
    meter.begin("single", lanes=1)
    device.pass_time(3600, power_w=80)
    fused = meter.end("fused")
    device.pass_time(3600, power_w=50)
    single = meter.end("single")
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
    meter.begin("a", lanes=1)
    device.pass_time(1800, power_w=100)
    assert meter.end("a").wh == pytest.approx(50)
    device.pass_time(3600, power_w=40)
    assert meter.idle_wh == pytest.approx(80)


def test_idle_energy_is_told_by_busy_time():
    """Each busy second bears the idle energy there has been per busy second, beside its own."""
    device = Device()
    meter = device.lanes()
    device.pass_time(3600, power_w=40)
    meter.begin("a", lanes=1)
    device.pass_time(1800, power_w=100)
    first = meter.end("a")
    assert first.idle_wh == pytest.approx(40)
    meter.begin("b", lanes=1)
    device.pass_time(1800, power_w=100)
    assert meter.end("b").idle_wh == pytest.approx(20)


def test_nothing_is_lost_or_counted_twice():
    """Requests plus idle are what the meter read, and busy seconds the time not idle (seed 3)."""
    rng = random.Random(3)
    device = Device()
    meter = device.lanes()
    running, used, busy_s = [], [], 0.0
    for number in range(500):
        seconds = rng.expovariate(1.0)
        busy_s += seconds if running else 0.0
        device.pass_time(seconds, power_w=rng.uniform(30, 300))
        if running and rng.random() < 0.5:
            used.append(meter.end(running.pop(rng.randrange(len(running)))))
        else:
            running.append(str(number))
            meter.begin(str(number), lanes=rng.randint(1, 8))
    used += [meter.end(request_id) for request_id in running]
    assert sum(use.wh for use in used) + meter.idle_wh == pytest.approx(device.wh)
    assert sum(use.busy_s for use in used) == pytest.approx(busy_s)
