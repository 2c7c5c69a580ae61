"""Meters: RAPL counters that wrap, GPUs by index and UUID, and what is said where there is none."""

import pytest

from policies.carbon.llmcarbon import find_device
from router.energy import (
    CpuTimeMeter,
    MeterError,
    NvmlMeter,
    RaplMeter,
    open_meter,
    visible_device,
)

WH_UJ = 3_600_000_000


def zone(root, name, kind, energy_uj, range_uj=262_143_328_850):
    """Write a powercap zone as Linux shows it."""
    folder = root / name
    folder.mkdir(exist_ok=True)
    (folder / "name").write_text(f"{kind}\n")
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{range_uj}\n")


def test_rapl_sums_packages_and_memory_but_not_their_parts(tmp_path):
    """Cores are inside their package, so only package and DRAM counters are added."""
    zone(tmp_path, "intel-rapl:0", "package-0", 1000)
    zone(tmp_path, "intel-rapl:0:0", "core", 500)
    zone(tmp_path, "intel-rapl:0:1", "dram", 10)
    zone(tmp_path, "intel-rapl:1", "package-1", 0)
    meter = RaplMeter(tmp_path)
    assert meter.read_wh() == 0
    zone(tmp_path, "intel-rapl:0", "package-0", 1000 + WH_UJ)
    zone(tmp_path, "intel-rapl:0:0", "core", 500 + WH_UJ)
    zone(tmp_path, "intel-rapl:0:1", "dram", 10 + WH_UJ // 2)
    zone(tmp_path, "intel-rapl:1", "package-1", 2 * WH_UJ)
    assert meter.read_wh() == pytest.approx(3.5)


def test_rapl_counters_that_wrap_go_on_counting(tmp_path):
    """A counter that fell has passed its range once."""
    zone(tmp_path, "intel-rapl:0", "package-0", 9 * WH_UJ, range_uj=10 * WH_UJ)
    meter = RaplMeter(tmp_path)
    zone(tmp_path, "intel-rapl:0", "package-0", 2 * WH_UJ, range_uj=10 * WH_UJ)
    assert meter.read_wh() == pytest.approx(3.0)


def test_a_machine_without_rapl_says_so(tmp_path):
    """No package below powercap is an error that names the folder."""
    with pytest.raises(MeterError, match="holds no RAPL package"):
        RaplMeter(tmp_path)


class FakeNvml:
    """The few calls of pynvml that the meter makes."""

    class NVMLError(Exception):
        """What pynvml raises."""

    def __init__(self, energy_mj):
        self.energy_mj = energy_mj
        self.opened = None

    def nvmlInit(self):  # noqa: N802 - NVML's name
        """Do nothing."""

    def nvmlDeviceGetHandleByIndex(self, index):  # noqa: N802
        """Remember what was opened."""
        self.opened = index
        return "handle"

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        """Remember what was opened."""
        self.opened = uuid
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        """Return millijoules, or fail as old GPUs do."""
        assert handle == "handle"
        if self.energy_mj is None:
            raise self.NVMLError("Not Supported")
        return self.energy_mj


def test_nvml_counts_from_when_it_was_opened():
    """The driver counts since it was loaded; the meter since it was opened."""
    nvml = FakeNvml(energy_mj=5_000_000)
    meter = NvmlMeter("2", nvml=nvml)
    nvml.energy_mj += 7_200_000
    assert meter.read_wh() == pytest.approx(2.0)
    assert nvml.opened == 2
    assert meter.method == "measured:nvml"


def test_nvml_opens_the_gpu_that_this_process_was_given(monkeypatch):
    """CUDA_VISIBLE_DEVICES names the physical GPU by index or UUID."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-abc,GPU-def")
    nvml = FakeNvml(energy_mj=0)
    NvmlMeter(visible_device(), nvml=nvml)
    assert nvml.opened == "GPU-abc"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_device() == "0"


def test_a_gpu_without_a_counter_says_so():
    """GPUs before Volta have none; a counter that fails later is an error too."""
    with pytest.raises(MeterError, match="GPU 0 has no energy counter: Not Supported"):
        NvmlMeter(nvml=FakeNvml(energy_mj=None))
    nvml = FakeNvml(energy_mj=1)
    meter = NvmlMeter(nvml=nvml)
    nvml.energy_mj = None
    with pytest.raises(MeterError, match="cannot be read"):
        meter.read_wh()


def test_auto_models_where_nothing_measures(tmp_path, caplog):
    """Without a meter "auto" gives none and logs why; one asked for by name is an error."""
    with caplog.at_level("INFO"):
        assert open_meter("auto", on_gpu=False, powercap=tmp_path) is None
    assert "modelled, not measured" in caplog.text
    with pytest.raises(MeterError):
        open_meter("rapl", on_gpu=False, powercap=tmp_path)
    assert open_meter("off", on_gpu=True) is None


def test_always_counts_the_time_of_vcpus_where_nothing_measures(tmp_path):
    """Idle power all the time, and each busy vCPU its share of what a busy machine draws more."""
    machine = find_device("cpu").times(4)
    opened = open_meter("always", on_gpu=False, device=machine, num_vcpus=4, powercap=tmp_path)
    assert opened is not None
    assert opened.method == "modelled:cpu-time"
    wall_s, cpu_s = iter([0.0, 3600.0]), iter([0.0, 7200.0])
    meter = CpuTimeMeter(
        machine, num_vcpus=4, clock=lambda: next(wall_s), cpu_clock=lambda: next(cpu_s)
    )
    assert meter.read_wh() == pytest.approx(4 * 0.64 + 2 * (3.97 - 0.64))


def test_auto_takes_rapl_where_it_can_be_read(tmp_path):
    """On a CPU engine with a package counter, energy is measured."""
    zone(tmp_path, "intel-rapl:0", "package-0", 0)
    meter = open_meter("auto", on_gpu=False, powercap=tmp_path)
    assert meter is not None
    assert meter.method == "measured:rapl"
