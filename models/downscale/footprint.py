"""Energy and carbon of the training itself.

On a CPU the process's CPU time is measured and its power taken from the table of devices; on a GPU
both come from the FLOPs (LLMCarbon). Each figure says so. The grid is the world's mean, since
nobody knows where a recipe is run.
"""

from __future__ import annotations

from typing import Any, Final

from policies.carbon import find_device, find_zone
from policies.carbon.llmcarbon import run_carbon

_ZONE: Final = "WORLD"
_GPU: Final = "h100"


def training_footprint(*, cpu_s: float, flops: float, device: str) -> dict[str, Any]:
    """Watt-hours and grams of CO2 equivalent, operational and embodied, and how they were got."""
    grid = find_zone(_ZONE)
    if device == "cpu":
        vcpu = find_device("cpu")
        wh = cpu_s * vcpu.power_w / 3600
        operational = wh * grid.gco2e_per_kwh / 1000
        embodied = cpu_s * vcpu.embodied_gco2e_per_s
        method = "CPU time measured, power per vCPU from the table"
    else:
        run = run_carbon(
            flops, find_device(_GPU), num_devices=1, pue=1.0, gco2e_per_kwh=grid.gco2e_per_kwh
        )
        wh, operational = 1e6 * run.mwh, 1e6 * run.operational_tco2e
        embodied = 1e6 * run.embodied_tco2e
        method = f"modelled from FLOPs (LLMCarbon, {_GPU})"
    return {
        "wh": round(wh, 4),
        "operational_gco2e": round(operational, 4),
        "embodied_gco2e": round(embodied, 4),
        "method": f"{method}; grid {_ZONE}, {grid.gco2e_per_kwh:g} g/kWh",
    }
