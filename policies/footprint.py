"""What answering costs: money, energy, carbon and time, before (estimated) and after (measured)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from policies.plan import Answer, Best, Plan, children

# Energy an engine draws while no request runs belongs to no request; meters report it apart.
IDLE_SHARE = "excluded"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """US dollars, watt-hours and grams of CO2 equivalent (operational plus embodied).

    `method` says how energy was found: "measured:nvml", "measured:rapl", "modelled:llmcarbon",
    "modelled:stated" (a remote model of stated size), "unknown" (and then not in the figures);
    several joined by "+", empty where nobody has said. Idle energy is excluded.
    """

    usd: float = 0.0
    wh: float = 0.0
    gco2e: float = 0.0
    method: str = ""


@dataclass(frozen=True, kw_only=True)
class Footprint(Cost):
    """One request's cost with its time, and what it was worked out from.

    `embodied_gco2e` is the embodied part of `gco2e`. `flops` and `busy_s` (seconds of a whole
    device) are what energy was derived from or attributed by.
    """

    latency_s: float = 0.0
    embodied_gco2e: float = 0.0
    flops: float = 0.0
    busy_s: float = 0.0

    @property
    def cost(self) -> Cost:
        """The cost alone."""
        return Cost(usd=self.usd, wh=self.wh, gco2e=self.gco2e, method=self.method)

    def then(self, other: Footprint) -> Footprint:
        """Return the cost of this followed by `other`: everything adds up."""
        return self._with(other, self.latency_s + other.latency_s)

    def beside(self, other: Footprint) -> Footprint:
        """Return the cost of both at the same time: the slower one sets the latency."""
        return self._with(other, max(self.latency_s, other.latency_s))

    def to_json(self) -> dict[str, Any]:
        """Return the footprint as JSON data, with how idle energy is treated."""
        return {**vars(self), "idle": IDLE_SHARE}

    def _with(self, other: Footprint, latency_s: float) -> Footprint:
        return Footprint(
            usd=self.usd + other.usd,
            wh=self.wh + other.wh,
            gco2e=self.gco2e + other.gco2e,
            latency_s=latency_s,
            embodied_gco2e=self.embodied_gco2e + other.embodied_gco2e,
            flops=self.flops + other.flops,
            busy_s=self.busy_s + other.busy_s,
            method=_join(self.method, other.method),
        )


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one model costs per token; every number is >= 0.

    USD comes from the pool file; Wh, gCO2e and seconds from measurement or a model of the
    hardware, zero where nobody has said. `gco2e_per_wh` is the grid's intensity (operational);
    `busy_s_per_token` the seconds of a whole device that a token takes, each of which also uses up
    `embodied_gco2e_per_s`. `method` is as in `Footprint`.
    """

    usd_per_input_token: float
    usd_per_output_token: float
    wh_per_input_token: float = 0.0
    wh_per_output_token: float = 0.0
    gco2e_per_wh: float = 0.0
    s_per_input_token: float = 0.0
    s_per_output_token: float = 0.0
    flops_per_token: float = 0.0
    busy_s_per_token: float = 0.0
    embodied_gco2e_per_s: float = 0.0
    method: str = ""

    def footprint(self, prompt_tokens: int, output_tokens: int) -> Footprint:
        """Return the estimated cost of reading `prompt_tokens` and writing `output_tokens`."""
        return self._footprint(
            prompt_tokens,
            output_tokens,
            wh=prompt_tokens * self.wh_per_input_token + output_tokens * self.wh_per_output_token,
            busy_s=(prompt_tokens + output_tokens) * self.busy_s_per_token,
            latency_s=prompt_tokens * self.s_per_input_token
            + output_tokens * self.s_per_output_token,
            method=self.method,
        )

    def measured(
        self,
        prompt_tokens: int,
        output_tokens: int,
        *,
        wh: float,
        busy_s: float,
        latency_s: float,
        method: str,
    ) -> Footprint:
        """Return the cost of an answer whose energy and device seconds a meter attributed to it."""
        return self._footprint(
            prompt_tokens, output_tokens, wh=wh, busy_s=busy_s, latency_s=latency_s, method=method
        )

    def _footprint(
        self,
        prompt_tokens: int,
        output_tokens: int,
        *,
        wh: float,
        busy_s: float,
        latency_s: float,
        method: str,
    ) -> Footprint:
        embodied_gco2e = busy_s * self.embodied_gco2e_per_s
        return Footprint(
            usd=prompt_tokens * self.usd_per_input_token
            + output_tokens * self.usd_per_output_token,
            wh=wh,
            gco2e=wh * self.gco2e_per_wh + embodied_gco2e,
            latency_s=latency_s,
            embodied_gco2e=embodied_gco2e,
            flops=(prompt_tokens + output_tokens) * self.flops_per_token,
            busy_s=busy_s,
            method=method,
        )


def estimate(
    plan: Plan, rates: Mapping[str, Rates], *, prompt_tokens: int, output_tokens: int
) -> Footprint:
    """Price `plan` before it runs, at most: every stage of a cascade is counted.

    A fused answer reads the prompt and writes each token once per member, side by side. Raises
    `KeyError` for a member without rates; plans are checked against the pool when they load.
    """
    total = Footprint()
    if isinstance(plan, Answer):
        for name in plan.members:
            total = total.beside(rates[name].footprint(prompt_tokens, output_tokens))
        return total
    for child in children(plan):
        cost = estimate(child, rates, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
        total = total.beside(cost) if isinstance(plan, Best) else total.then(cost)
    return total


def _join(one: str, other: str) -> str:
    if one == other or not other:
        return one
    if not one:
        return other
    return "+".join(sorted({*one.split("+"), *other.split("+")}))
