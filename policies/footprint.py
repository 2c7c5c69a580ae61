"""What answering costs: money, energy, carbon and time, before (estimated) and after (measured).

Each figure of energy has a `Method`, and lies between `low` and `high` times what is printed.
Errors of one method are systematic, so that the ranges of sums are the sums of the ranges.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
from typing import Any, Literal, TypeAlias

from policies.plan import Answer, Best, Plan, children


@dataclass(frozen=True, kw_only=True)
class Method:
    """One way to know energy: its error as factors, where they come from, and since when.

    `guesses_time` says that the device's busy seconds are guessed too, and are off alike.
    """

    name: str
    low: float
    high: float
    source: str
    date: str
    guesses_time: bool = False


# What a GPU's counter was found to miss of a steady draw on more than seventy GPUs; NVIDIA's own
# reference of NVML says the same of Fermi and Kepler. One short request may be off by more.
NVML = Method(
    name="measured:nvml",
    low=0.95,
    high=1.05,
    source="a GPU's own counter, whole board; 5% of a steady draw against meters (Yang et al., "
    "arXiv 2312.02741). Of short work an A100 or H100 samples a quarter: there they cut errors by "
    "35% in the mean and by 65% at most",
    date="2024-11",
)
# The worst mean error that a comparison of such counters with meters found, in either direction.
RAPL = Method(
    name="measured:rapl",
    low=0.58,
    high=1.73,
    source="a CPU's own counters, package and memory. They follow the plug closely (Khan et al., "
    "RAPL in Action, 2018), but the energy that work adds was off by up to 73% in the mean (Fahad "
    "et al., Energies 12(11) 2204, 2019); power supply and fans are not in it",
    date="2019-06",
)
# The least and the most that a busy vCPU draws by the same tables, against the table's 3.97 W.
CPU_TIME = Method(
    name="modelled:cpu-time",
    low=0.40,
    high=2.16,
    source="seconds of vCPUs times their power; cloud-carbon-coefficients: 1.58 (EPYC, 2nd "
    "generation) to 8.58 W (Sandy Bridge) a busy vCPU; state yours (`shoal calibrate energy`)",
    date="2023-09",
)
# Low: LLMCarbon's own residuals (actual over predicted energy of the five training runs of its
# table 4: 0.93 to 1.04) times 0.35, which is assumed, over the best efficiency there (0.39). High:
# a published measurement of serving, 0.12 J a token of Llama-3.1-8B on an H100 at batch 64
# (ML.ENERGY 3.0), against the 0.0325 J that these equations give.
_LOW, _HIGH = 0.83, 3.7
LLMCARBON = Method(
    name="modelled:llmcarbon",
    low=_LOW,
    high=_HIGH,
    source="LLMCarbon's equations (Faiz et al. 2024), efficiency assumed; its residuals, and "
    "ML.ENERGY 3.0 at batch 64. One request alone on a large GPU takes many times more",
    date="2026-11",
    guesses_time=True,
)
STATED = Method(
    name="modelled:stated",
    low=_LOW,
    high=_HIGH,
    source="LLMCarbon's equations with the size and the hardware that were stated of a remote "
    "model; errors as LLMCarbon's",
    date="2026-11",
    guesses_time=True,
)
UNKNOWN = Method(
    name="unknown",
    low=1.0,
    high=1.0,
    source="nobody knows: not in the figures, so that these are too low",
    date="",
)

METHODS = {m.name: m for m in (NVML, RAPL, CPU_TIME, LLMCARBON, STATED, UNKNOWN)}


def method_of(name: str) -> Method:
    """Return the method called `name`; one without error where there is none of that name."""
    return METHODS.get(name) or Method(name=name, low=1.0, high=1.0, source="", date="")


def explain_methods(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return what is known of the methods in `names`, each of which may join several by "+"."""
    single = sorted({part for name in names for part in name.split("+") if part})
    return {
        name: {
            k: v for k, v in asdict(method_of(name)).items() if k not in ("name", "guesses_time")
        }
        for name in single
    }


# What becomes of the energy that a device draws while no request runs. It is never part of `wh`.
# "excluded": nobody's. "busy_time": each busy second bears what idle energy there has been per busy
# second. "capacity": each busy second bears the idle seconds that the planned utilisation leaves.
IdleRule: TypeAlias = Literal["excluded", "busy_time", "capacity"]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """US dollars, watt-hours and grams of CO2 equivalent (operational plus embodied).

    `method` says how energy was found, by a name of `METHODS`, and `price` how money was:
    "typed" in the pool file, or worked out from the "hardware" (`policies.carbon.economics`);
    several are joined by "+", empty where nobody has said. The true figures lie between `_low` and
    `_high` as far as the methods' errors go. `busy_s` are seconds of a whole device; `idle_wh` is
    the idle energy that the configured rule adds, and is not in `wh`.
    """

    usd: float = 0.0
    usd_low: float = 0.0
    usd_high: float = 0.0
    wh: float = 0.0
    wh_low: float = 0.0
    wh_high: float = 0.0
    gco2e: float = 0.0
    gco2e_low: float = 0.0
    gco2e_high: float = 0.0
    busy_s: float = 0.0
    idle_wh: float = 0.0
    method: str = ""
    price: str = ""


@dataclass(frozen=True, kw_only=True)
class Footprint(Cost):
    """One request's cost with its time, and what it was worked out from.

    `embodied_gco2e` is the embodied part of `gco2e`. `flops` and `busy_s` are what energy was
    derived from or attributed by.
    """

    latency_s: float = 0.0
    embodied_gco2e: float = 0.0
    flops: float = 0.0

    @property
    def cost(self) -> Cost:
        """The cost alone."""
        return Cost(**{name: getattr(self, name) for name in COST_FIELDS})

    def then(self, other: Footprint) -> Footprint:
        """Return the cost of this followed by `other`: everything adds up."""
        return _sum((self, other), self.latency_s + other.latency_s)

    def beside(self, other: Footprint) -> Footprint:
        """Return the cost of both at the same time: the slower one sets the latency."""
        return Footprint.together((self, other))

    def to_json(self) -> dict[str, Any]:
        """Return the footprint as JSON data."""
        return dict(vars(self))

    @classmethod
    def together(cls, costs: Sequence[Footprint]) -> Footprint:
        """Return the cost of all `costs` at the same time, whether few or a hundred."""
        if len(costs) == 1:
            return costs[0]
        return _sum(costs, max((cost.latency_s for cost in costs), default=0.0))


COST_FIELDS = tuple(field.name for field in fields(Cost))
"""The fields of a `Cost`; those that are numbers add up, and so are columns of the ledger."""
AMOUNTS = tuple(name for name in COST_FIELDS if name not in ("method", "price"))
_SUMMED = {name: attrgetter(name) for name in (*AMOUNTS, "embodied_gco2e", "flops")}


def _sum(costs: Sequence[Footprint], latency_s: float) -> Footprint:
    return Footprint(
        **{name: sum(map(read, costs)) for name, read in _SUMMED.items()},
        latency_s=latency_s,
        method=joined({cost.method for cost in costs}),
        price=joined({cost.price for cost in costs}),
    )


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one model costs per token; every number is >= 0.

    USD per token comes from the pool file; Wh, gCO2e and seconds from measurement or a model of the
    hardware, zero where nobody has said. `gco2e_per_wh` is the grid's intensity (operational), and
    its true value that divided or multiplied by at most `grid_factor`. `busy_s_per_token` are the
    seconds of a whole device that a token takes; each uses up `embodied_gco2e_per_s`, and costs
    `usd_per_busy_s` beside `usd_per_wh` where the price follows from the hardware. `idle` is the
    rule for idle energy, `idle_wh_per_busy_s` what a busy second bears of it at the planned
    utilisation. `method` and `price` are as in `Cost`.
    """

    usd_per_input_token: float
    usd_per_output_token: float
    usd_per_busy_s: float = 0.0
    usd_per_wh: float = 0.0
    price: str = "typed"
    wh_per_input_token: float = 0.0
    wh_per_output_token: float = 0.0
    gco2e_per_wh: float = 0.0
    grid_factor: float = 1.0
    s_per_input_token: float = 0.0
    s_per_output_token: float = 0.0
    flops_per_token: float = 0.0
    busy_s_per_token: float = 0.0
    embodied_gco2e_per_s: float = 0.0
    idle: IdleRule = "excluded"
    idle_wh_per_busy_s: float = 0.0
    method: str = ""

    def footprint(self, prompt_tokens: int, output_tokens: int) -> Footprint:
        """Return the estimated cost of reading `prompt_tokens` and writing `output_tokens`."""
        return self.measured(
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
        idle_wh: float = 0.0,
    ) -> Footprint:
        """Return the cost of an answer whose energy and device seconds are known by `method`.

        `idle_wh` is its share of the idle energy by busy time, where that was measured.
        """
        known = method_of(method)
        typed = prompt_tokens * self.usd_per_input_token + output_tokens * self.usd_per_output_token
        embodied = busy_s * self.embodied_gco2e_per_s
        operational = wh * self.gco2e_per_wh
        time_usd, energy_usd = busy_s * self.usd_per_busy_s, wh * self.usd_per_wh
        low, high, grid = known.low, known.high, self.grid_factor
        # Where energy follows from seconds that are guessed themselves, all of it is off alike.
        time_low, time_high = (low, high) if known.guesses_time else (1.0, 1.0)
        return Footprint(
            usd=typed + time_usd + energy_usd,
            usd_low=typed + time_usd * time_low + energy_usd * low,
            usd_high=typed + time_usd * time_high + energy_usd * high,
            wh=wh,
            wh_low=wh * low,
            wh_high=wh * high,
            gco2e=operational + embodied,
            gco2e_low=operational * low / grid + embodied * time_low,
            gco2e_high=operational * high * grid + embodied * time_high,
            busy_s=busy_s,
            idle_wh={
                "excluded": 0.0,
                "busy_time": idle_wh,
                "capacity": busy_s * self.idle_wh_per_busy_s,
            }[self.idle],
            method=method,
            price=self.price,
            latency_s=latency_s,
            embodied_gco2e=embodied,
            flops=(prompt_tokens + output_tokens) * self.flops_per_token,
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


def joined(names: Iterable[str]) -> str:
    """Return methods or prices of several costs as their sum's: each once, with "+" between."""
    return "+".join(sorted({part for name in names for part in name.split("+") if part}))


_CEILINGS = ("max_usd", "max_wh", "max_gco2e", "max_latency_s")


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

    @classmethod
    def of(cls, settings: object) -> Limits:
        """Return what `settings` say in fields of the same names."""
        return cls(**{each.name: getattr(settings, each.name) for each in fields(cls)})

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
            **{name: _least(getattr(self, name), getattr(other, name)) for name in _CEILINGS},
            quality_floor=max(
                (v for v in (self.quality_floor, other.quality_floor) if v is not None),
                default=None,
            ),
        )

    @property
    def caps_cost(self) -> bool:
        """Whether any ceiling on cost or latency is set."""
        return any(getattr(self, name) is not None for name in _CEILINGS)


NO_LIMITS = Limits()


def _least(one: float | None, other: float | None) -> float | None:
    return min((value for value in (one, other) if value is not None), default=None)
