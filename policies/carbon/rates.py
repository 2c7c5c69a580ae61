"""Rates of a model on a device: LLMCarbon's estimate where nobody has measured."""

from __future__ import annotations

from dataclasses import replace

from policies.base import ModelFacts
from policies.carbon.hardware import Device
from policies.carbon.llmcarbon import inference_flops
from policies.footprint import Rates

MODELLED = "modelled:llmcarbon"
STATED = "modelled:stated"
"""The same equations, with the size and the hardware that the user states of a remote model."""
UNKNOWN = "unknown"


def rates_for(
    facts: ModelFacts, device: Device | None, *, gco2e_per_kwh: float, pue: float
) -> Rates:
    """Return `facts.rates` with energy and carbon per token filled in.

    2N FLOPs per token at the FLOP/s that `device` reaches give busy seconds; times its average
    power and the PUE, watt-hours; times the grid's intensity, operational carbon; busy seconds over
    the device's lifetime give the embodied part. A token read and one written cost the same FLOPs;
    that decoding is slower per FLOP than reading is not modelled (measure it, or lower the device's
    efficiency). Where the rates say nothing of latency, busy seconds are the least it can be. Idle
    time is not counted. A model whose size or hardware nobody knows keeps its
    rates, and its method says "unknown".
    """
    if facts.parameters is None or device is None:
        return replace(facts.rates, method=UNKNOWN)
    flops = inference_flops(facts.parameters, 1)
    busy_s = flops / device.flops_per_s
    wh = busy_s * device.power_w * pue / 3600
    return replace(
        facts.rates,
        wh_per_input_token=wh,
        wh_per_output_token=wh,
        gco2e_per_wh=gco2e_per_kwh / 1000,
        s_per_input_token=facts.rates.s_per_input_token or busy_s,
        s_per_output_token=facts.rates.s_per_output_token or busy_s,
        flops_per_token=flops,
        busy_s_per_token=busy_s,
        embodied_gco2e_per_s=device.embodied_gco2e_per_s,
        method=STATED if facts.remote else MODELLED,
    )
