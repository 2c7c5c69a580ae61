"""What answering costs: money, energy, carbon and time, before (estimated) and after (measured)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from policies.plan import Answer, Best, Plan, children


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """One request's cost: US dollars, watt-hours, grams of CO2 equivalent, seconds."""

    usd: float = 0.0
    wh: float = 0.0
    gco2e: float = 0.0
    latency_s: float = 0.0

    def then(self, other: Footprint) -> Footprint:
        """Return the cost of this followed by `other`: everything adds up."""
        return self._with(other, self.latency_s + other.latency_s)

    def beside(self, other: Footprint) -> Footprint:
        """Return the cost of both at the same time: the slower one sets the latency."""
        return self._with(other, max(self.latency_s, other.latency_s))

    def _with(self, other: Footprint, latency_s: float) -> Footprint:
        return Footprint(
            usd=self.usd + other.usd,
            wh=self.wh + other.wh,
            gco2e=self.gco2e + other.gco2e,
            latency_s=latency_s,
        )


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one model costs per token; every field is >= 0.

    USD comes from the pool file; Wh, gCO2e and seconds from measurement or a model of the
    hardware, zero where nobody has said.
    """

    usd_per_input_token: float
    usd_per_output_token: float
    wh_per_input_token: float = 0.0
    wh_per_output_token: float = 0.0
    gco2e_per_wh: float = 0.0
    s_per_input_token: float = 0.0
    s_per_output_token: float = 0.0

    def footprint(self, prompt_tokens: int, output_tokens: int) -> Footprint:
        """Return the cost of reading `prompt_tokens` and writing `output_tokens`."""
        wh = prompt_tokens * self.wh_per_input_token + output_tokens * self.wh_per_output_token
        return Footprint(
            usd=prompt_tokens * self.usd_per_input_token
            + output_tokens * self.usd_per_output_token,
            wh=wh,
            gco2e=wh * self.gco2e_per_wh,
            latency_s=prompt_tokens * self.s_per_input_token
            + output_tokens * self.s_per_output_token,
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
