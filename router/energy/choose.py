"""Which meter an engine replica gets."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Literal, TypeAlias

from models.spec import EngineSpec
from policies.carbon.settings import CarbonSettings
from router.energy.base import Meter, MeterError
from router.energy.lanes import LaneMeter
from router.energy.nvml import NvmlMeter, visible_device
from router.energy.rapl import POWERCAP, RaplMeter

logger = logging.getLogger(__name__)

MeterKind: TypeAlias = Literal["auto", "rapl", "nvml", "off"]


def lane_meter(carbon: CarbonSettings, spec: EngineSpec) -> LaneMeter | None:
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
    meter = open_meter(carbon.meter, on_gpu=on_gpu)
    return None if meter is None else LaneMeter(meter, clock=time.monotonic, pue=carbon.pue)


def open_meter(kind: MeterKind, *, on_gpu: bool, powercap: Path = POWERCAP) -> Meter | None:
    """Open the meter that `kind` names; "auto" takes NVML for GPUs, RAPL for CPUs, or none.

    Where "auto" finds nothing to read, energy is modelled instead, and the log says why. Raises
    `MeterError` where a meter was asked for by name and cannot be read.
    """
    if kind == "off":
        return None
    try:
        if kind == "nvml" or (kind == "auto" and on_gpu):
            return NvmlMeter(visible_device())
        return RaplMeter(powercap)
    except MeterError as error:
        if kind != "auto":
            raise
        logger.info("energy is modelled, not measured: %s", error)
        return None
