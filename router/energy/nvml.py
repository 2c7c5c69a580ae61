"""NVML: the energy of an NVIDIA GPU, from its own counter."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

from router.energy.base import MeterError

_MILLIJOULES_PER_WH = 3.6e6


class NvmlMeter:
    """Reads a GPU's total energy consumption (Volta and later); the whole board is counted."""

    method = "measured:nvml"

    def __init__(self, device: str = "0", *, nvml: Any = None) -> None:  # noqa: ANN401 - a module
        """Open the GPU with this index or UUID; `nvml` replaces the pynvml module.

        Raises `MeterError` without the nvidia-ml-py package, a driver, or such a counter.
        """
        self._nvml = nvml if nvml is not None else _load()
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


def _load() -> Any:  # noqa: ANN401 - an optional module without types
    try:
        return import_module("pynvml")
    except ImportError:
        raise MeterError(
            "measuring a GPU's energy needs the package nvidia-ml-py: pip install nvidia-ml-py"
        ) from None
