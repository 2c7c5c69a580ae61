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


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Ceilings on one request's estimated cost, a latency ceiling and a floor on quality.

    None means no limit. `quality_floor` is a predicted quality in [0, 1]. Costs are estimated at
    the most tokens that the request may take, so a ceiling holds whatever the answer's length.
    """

    max_usd: float | None = None
    max_wh: float | None = None
    max_gco2e: float | None = None
    max_latency_s: float | None = None
    quality_floor: float | None = None

    def exceeded(self, cost: Footprint) -> tuple[str, ...]:
        """Return the names of the ceilings that `cost` is above; empty when it fits."""
        ceilings = (
            ("max_usd", self.max_usd, cost.usd),
            ("max_wh", self.max_wh, cost.wh),
            ("max_gco2e", self.max_gco2e, cost.gco2e),
            ("max_latency_s", self.max_latency_s, cost.latency_s),
        )
        return tuple(
            name for name, ceiling, value in ceilings if ceiling is not None and value > ceiling
        )

    def stricter(self, other: Limits) -> Limits:
        """Return the limits that hold where both do."""
        if other is NO_LIMITS:
            return self
        return Limits(
            max_usd=_least(self.max_usd, other.max_usd),
            max_wh=_least(self.max_wh, other.max_wh),
            max_gco2e=_least(self.max_gco2e, other.max_gco2e),
            max_latency_s=_least(self.max_latency_s, other.max_latency_s),
            quality_floor=max(
                (v for v in (self.quality_floor, other.quality_floor) if v is not None),
                default=None,
            ),
        )

    @property
    def caps_cost(self) -> bool:
        """Whether any ceiling on cost or latency is set."""
        return any(
            value is not None
            for value in (self.max_usd, self.max_wh, self.max_gco2e, self.max_latency_s)
        )


NO_LIMITS = Limits()


def _least(one: float | None, other: float | None) -> float | None:
    return min((value for value in (one, other) if value is not None), default=None)
