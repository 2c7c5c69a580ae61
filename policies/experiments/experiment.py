"""What an experiment is: its arms, who takes part, what decides, and what stops it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Literal, TypeAlias

from pydantic import Field, with_config

from policies.errors import ExperimentError
from policies.experiments.metrics import (
    COVARIATES,
    JUDGED,
    METRIC_NAME,
    METRICS,
    Covariate,
    Direction,
    Goal,
    Guardrail,
    Metric,
    OwnMetric,
)

Unit: TypeAlias = Literal["user", "session", "request", "block"]
Segment: TypeAlias = Literal["key", "domain", "length", "language"]
Correction: TypeAlias = Literal["bonferroni", "benjamini-hochberg"]

HOLDOUT = "holdout"
_YEAR_MINUTES = 527_040


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class Arm:
    """One alternative: the policy that answers its units. `weight` is its share of them."""

    name: str
    policy: str
    weight: Annotated[float, Field(ge=0, le=1)]


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class Audience:
    """Which requests may take part; an empty tuple means all.

    `models` are the names that clients ask for: an experiment never overrules a client that
    named a model or policy itself, unless that name stands here. `keys` are API key ids,
    `domains` the domain a request states or the router predicts.
    """

    models: tuple[str, ...] = ("auto",)
    keys: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()

    def overlaps(self, other: Audience) -> bool:
        """Return whether some request could match both."""
        pairs = (
            (self.models, other.models),
            (self.keys, other.keys),
            (self.domains, other.domains),
        )
        return all(not a or not b or set(a) & set(b) for a, b in pairs)


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class Allocation:
    """How weights move.

    "fixed"; "thompson": each arm's probability of being the best; "best_arm": towards telling the
    best arm from its closest rivals, with a stopping rule of its own
    (`policies.experiments.sequences`). `floor` is the least weight that is left to an arm. Adaptive
    weights lose guarantees that fixed ones have: see `policies.experiments.assignment`.
    """

    kind: Literal["fixed", "thompson", "best_arm"] = "fixed"
    floor: float = 0.05


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class Switchback:
    """Time in blocks, of which each goes to one arm as a whole: for arms that share machines.

    Blocks begin at a random offset. What comes within `washout_minutes` of a block's begin counts
    for no arm, since the machines still work on what the block before left.
    """

    block_minutes: Annotated[float, Field(ge=0.01, le=_YEAR_MINUTES)] = 60.0
    washout_minutes: Annotated[float, Field(ge=0)] = 5.0

    def block(self, now_s: float, offset: float) -> tuple[int, bool]:
        """Return the block's number at Unix time `now_s`, and whether it is still washing out.

        `offset` in [0, 1) is the share of a block by which all of them are shifted.
        """
        length_s = self.block_minutes * 60
        blocks = now_s / length_s + offset
        number = math.floor(blocks)
        return number, (blocks - number) * length_s < self.washout_minutes * 60


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One experiment on one share of the traffic.

    `traffic` is the share of the layer's units that take part; `offset` where that share starts
    in the layer (None: the first free place). Experiments of one layer share out its units, so
    that nobody is in two of them. `holdout` is the share of this experiment's units that stay
    with the control's policy whatever happens to weights and arms. `start` and `stop` are UTC
    if they name no zone. `covariates` reduce variance (CUPED) and are known before the answer.
    `metrics` are one's own; `segments` are the parts of the traffic in which the primary metric is
    compared too. `correction` says how the secondary comparisons, and those of segments, allow for
    their number: intervals that all hold together, or a share `alpha` of false discoveries.
    `judge` names the shadow whose model grades a sample of the answers.
    `switchback` is for the unit "block" (None: as `Switchback` has it).
    `salt` seeds the assignment: a new one draws new groups.
    """

    name: str
    arms: tuple[Arm, ...]
    unit: Unit = "user"
    primary: Goal = field(default_factory=Goal)
    secondary: tuple[str, ...] = ()
    metrics: Mapping[str, OwnMetric] = field(default_factory=dict)
    segments: tuple[Segment, ...] = ()
    correction: Correction = "bonferroni"
    judge: str | None = None
    switchback: Switchback | None = None
    guardrails: tuple[Guardrail, ...] = ()
    control: str | None = None
    traffic: Annotated[float, Field(gt=0, le=1)] = 1.0
    layer: str = "default"
    offset: float | None = None
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target: Audience = field(default_factory=Audience)
    start: datetime | None = None
    stop: datetime | None = None
    covariates: tuple[Covariate, ...] = ()
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05
    allocation: Allocation = field(default_factory=Allocation)
    salt: str | None = None

    def __post_init__(self) -> None:
        where = f"experiments.{self.name}"
        self._check_arms(where)
        self._check_bounds(where)
        self._check_own_metrics(where)
        self._check_metrics(where)
        self._check_effects(where)
        self._check_repeated(where)

    def _check_arms(self, where: str) -> None:
        names = [arm.name for arm in self.arms]
        if len(names) < 2:
            raise ExperimentError(f"{where}.arms: {names} is too few; name at least two arms")
        if len(set(names)) != len(names):
            raise ExperimentError(f"{where}.arms: {names} names an arm twice")
        for name in names:
            if not name.strip() or "/" in name:
                raise ExperimentError(
                    f"{where}.arms: {name!r} is no name for an arm; a slash parts it from the "
                    "experiment's name in labels"
                )
        if HOLDOUT in names:
            raise ExperimentError(
                f"{where}.arms: the name {HOLDOUT!r} is taken; set {where}.holdout to a share"
            )
        total = math.fsum(arm.weight for arm in self.arms)
        if abs(total - 1) > 1e-6:
            weights = {arm.name: arm.weight for arm in self.arms}
            raise ExperimentError(f"{where}.arms: weights {weights} sum to {total:g}, not to 1")
        if self.control is not None and self.control not in names:
            raise ExperimentError(
                f"{where}.control: {self.control!r} is not an arm; allowed are {', '.join(names)}"
            )

    def _check_bounds(self, where: str) -> None:
        if self.offset is not None:
            _within(f"{where}.offset", self.offset, low=0, high=1 - self.traffic)
        floor = self.allocation.floor
        _within(f"{where}.allocation.floor", floor, low=0, high=1 / len(self.arms))
        if self.start and self.stop and self.start_s >= self.stop_s:
            raise ExperimentError(
                f"{where}.stop: {self.stop.isoformat()} is not after {self.start.isoformat()}"
            )
        if self.switchback is not None and self.unit != "block":
            raise ExperimentError(
                f"{where}.switchback: gives blocks to arms, but the unit is {self.unit!r}; "
                'it goes with unit: "block"'
            )
        blocks = self.blocks
        if not blocks.washout_minutes < blocks.block_minutes:
            raise ExperimentError(
                f"{where}.switchback.washout_minutes: {blocks.washout_minutes} is not in "
                f"[0, {blocks.block_minutes:g}), the length of a block"
            )

    def _check_own_metrics(self, where: str) -> None:
        for name, own in self.metrics.items():
            # Warehouses, which get a column of each, mostly do not tell capital letters from small.
            others = [own for own in self.metrics if own != name]
            taken = (*METRICS, *COVARIATES, "unit", "timestamp", *others)
            if name.lower() in map(str.lower, taken):
                raise ExperimentError(f"{where}.metrics: the name {name!r} is taken")
            if not METRIC_NAME.fullmatch(name):
                raise ExperimentError(
                    f"{where}.metrics: {name!r} is no name that feedback can bring: up to 64 "
                    "letters, digits, '_', '.' and '-', the first a letter or '_'"
                )
            if own.ratio is not None and (own.kind == "binary" or len(set(own.ratio)) == 1):
                raise ExperimentError(
                    f'{where}.metrics.{name}.ratio: a ratio is of two metrics, and "real"'
                )

    def _check_metrics(self, where: str) -> None:
        allowed = (*METRICS, *self.metrics)
        if self.judge is None:
            allowed = tuple(name for name in allowed if name not in JUDGED)
        for key, metric in (
            ("primary.metric", self.primary.metric),
            *(("secondary", metric) for metric in self.secondary),
            *(("guardrails", guardrail.metric) for guardrail in self.guardrails),
            *(
                (f"metrics.{name}.ratio", part)
                for name, own in self.metrics.items()
                for part in own.ratio or ()
            ),
        ):
            made = metric == "judged_quality" or self.is_ratio(metric)
            if metric not in allowed or ("ratio" in key and made):
                raise ExperimentError(
                    f"{where}.{key}: {metric!r} is unknown; allowed are {', '.join(allowed)}"
                )

    def _check_effects(self, where: str) -> None:
        for key, goal in (("primary", self.primary), *self._own_goals()):
            share = self.metric(goal.metric).is_share and not goal.relative
            most = 1 if share else math.inf
            if not 0 < goal.minimum_effect < most:
                raise ExperimentError(
                    f"{where}.{key}.minimum_effect: {goal.minimum_effect} is not between 0 and "
                    f"{most:g}"
                )

    def _check_repeated(self, where: str) -> None:
        for key, names in (
            ("secondary", self.secondary),
            ("guardrails", tuple(guardrail.metric for guardrail in self.guardrails)),
            ("segments", self.segments),
            ("covariates", self.covariates),
        ):
            for name in names:
                if names.count(name) > 1:
                    raise ExperimentError(f"{where}.{key}: {name!r} is there twice")

    def _own_goals(self) -> Iterator[tuple[str, Goal]]:
        for name, own in self.metrics.items():
            goal = Goal(metric=name, minimum_effect=own.minimum_effect, relative=own.relative)
            yield f"metrics.{name}", goal

    def is_ratio(self, name: str) -> bool:
        """Return whether the metric called `name` is a ratio of two others."""
        return name in self.metrics and self.metrics[name].ratio is not None

    def metric(self, name: str) -> Metric:
        """Return the metric called `name`, one's own or one that there always is."""
        own = self.metrics.get(name)
        if own is None:
            return METRICS[name]
        unit = "share" if own.kind == "binary" and own.ratio is None else own.unit
        return Metric(name, own.direction, unit)

    @property
    def control_arm(self) -> Arm:
        """The arm that the others are compared with: `control`, or the first."""
        return next((arm for arm in self.arms if arm.name == self.control), self.arms[0])

    @property
    def treatments(self) -> tuple[Arm, ...]:
        """Every arm but the control's."""
        return tuple(arm for arm in self.arms if arm != self.control_arm)

    @property
    def blocks(self) -> Switchback:
        """How time is cut where the unit is "block"."""
        return self.switchback or Switchback()

    @property
    def direction(self) -> Direction:
        """The good direction of the primary metric: as configured, or the metric's own."""
        return self.primary.direction or self.metric(self.primary.metric).direction

    @property
    def start_s(self) -> float:
        """The start as Unix time; minus infinity if it has none."""
        return -math.inf if self.start is None else _unix_s(self.start)

    @property
    def stop_s(self) -> float:
        """The stop as Unix time; infinity if it has none."""
        return math.inf if self.stop is None else _unix_s(self.stop)

    def fingerprint(self, policies: Mapping[str, str]) -> str:
        """Return a hash of all that must not change while the experiment runs.

        `policies` maps each arm's policy to a description of its contents, so that a new router
        under an old name counts as a change. Weights, traffic, stop and guardrails may change.
        """
        fixed = {
            "arms": [[arm.name, arm.policy, policies.get(arm.policy, "")] for arm in self.arms],
            "control": self.control_arm.name,
            "unit": self.unit,
            **({"switchback": asdict(self.blocks)} if self.unit == "block" else {}),
            "holdout": self.holdout,
            "target": asdict(self.target),
            "primary": [self.primary.metric, self.direction],
            "layer": self.layer,
            "salt": self.salt,
        }
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def _unix_s(moment: datetime) -> float:
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _within(key: str, value: float, *, low: float, high: float) -> None:
    if not low <= value <= high + 1e-12:
        raise ExperimentError(f"{key}: {value} is not in [{low:g}, {high:g}]")
