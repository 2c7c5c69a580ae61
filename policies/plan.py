"""Plans: which models answer a request, and how their answers combine.

Three combinators cover the ensemble literature (Lu et al. 2024, "Merge, Ensemble, and Cooperate"):

- `Answer`: one member generates (before inference), or several are fused token by token
  (during inference);
- `Cascade`: try stages in order, stop at the first answer that is good enough (after inference);
- `Best`: run candidates side by side and select one (after inference).

They nest freely, are frozen, and read from and write to JSON; a plan that exists makes sense, and
all of its numbers are finite and bounded. This module knows nothing of how plans run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.dataclasses import dataclass, rebuild_dataclass

from policies.errors import PlanError
from policies.kinds import Settings, first_problem, short

FusionRule: TypeAlias = Literal["mixture", "product", "gated", "contrastive"]
Weighting: TypeAlias = Literal["static", "router", "perplexity", "evidence"]
Selection: TypeAlias = Literal["majority", "confidence", "scorer", "ranker"]

_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
# JSON has lists where plans have tuples.
_LIST = Field(strict=False)

Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=256)]
Probability: TypeAlias = Annotated[float, Field(ge=0, le=1)]
Weight: TypeAlias = Annotated[float, Field(ge=0, le=1e6)]
# A log-likelihood divided by less would overflow; by more, all weigh alike. Engines hold to it too.
TEMPERATURES = (1e-6, 1e6)
Temperature: TypeAlias = Annotated[float, Field(ge=TEMPERATURES[0], le=TEMPERATURES[1])]
Timeout: TypeAlias = Annotated[float, Field(ge=1e-3, le=86_400)]

_LEAST_LARGEST_WEIGHT = 1e-6


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Answer:
    """Generate with one member, or fuse several at every token.

    `rule` makes the next-token distribution of the members' p_m and weights w_m:

    - "mixture": Σ w_m p_m;
    - "product": Π p_m^w_m, renormalised (product of experts);
    - "gated": the first member alone where its likeliest token has at least probability `gate`,
      the mixture elsewhere (SAFE: fuse only where the lead is unsure);
    - "contrastive": expert minus anti-expert. Of two members p_1^(1+c) / p_2^c, of three
      p_1 (p_2 / p_3)^c with c = `contrast` (proxy tuning, Liu et al. 2024), among the tokens that
      the first member finds at least a tenth as likely as its best (Li et al. 2022). Takes no
      weights.

    `weights` are relative (they need not sum to one); None means uniform. `weighting` says what
    becomes of them: "static" takes them as they are; "router" fills in the policy's predicted
    quality of each member when the plan is made; "perplexity" is softmax(-prompt loss per token /
    τ) whatever they are (PackLLM, Mavromatis et al. 2024); "evidence" multiplies them, or the
    router's, with exp(prompt log-likelihood / T). `temperature` is τ or T; None takes 1. With
    `update`, the evidence goes on with every token of the answer.
    """

    members: Annotated[tuple[Name, ...], _LIST]
    weights: Annotated[tuple[Weight, ...], _LIST] | None = None
    rule: FusionRule = "mixture"
    weighting: Weighting = "static"
    gate: Probability = 0.9
    contrast: Annotated[float, Field(ge=0, le=10)] = 0.5
    temperature: Temperature | None = None
    update: bool = False

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        num_members = len(self.members)
        if not num_members:
            raise PlanError("answer.members is empty; name at least one model")
        if len(set(self.members)) != num_members:
            raise PlanError(f"answer.members names a model twice: {short(list(self.members))}")
        if self.weights is not None and len(self.weights) != num_members:
            raise PlanError(
                f"answer.weights has {len(self.weights)} entries for {num_members} members"
            )
        if self.weights is not None and max(self.weights) < _LEAST_LARGEST_WEIGHT:
            raise PlanError(
                f"answer.weights {short(list(self.weights))}: the largest of them must be at "
                f"least {_LEAST_LARGEST_WEIGHT:g}, not all of them zero"
            )
        if self.weighting not in ("perplexity", "evidence"):
            for name, given in (
                ("temperature", self.temperature is not None),
                ("update", self.update),
            ):
                if given:
                    raise PlanError(
                        f"answer.{name} means nothing without weights 'perplexity' or 'evidence'"
                    )
        if self.rule == "contrastive":
            if num_members not in (2, 3):
                raise PlanError(
                    "answer.rule 'contrastive' needs two members (expert, anti-expert) or three "
                    f"(base, expert, anti-expert), got {num_members}"
                )
            if self.weights is not None or self.weighting != "static":
                raise PlanError("answer.weights: the rule 'contrastive' takes none; see contrast")
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Cascade:
    """Run `stages` in order; stop when the answer's P(correct) reaches that stage's threshold.

    `thresholds` has one entry per stage but the last; the last stage's answer is always accepted.
    `scorer` names the model of P(correct | query, answer); "confidence" is the geometric mean of
    the answer's token probabilities, which needs no training (FrugalGPT, Chen et al. 2023, section
    3). A stage that takes longer than its entry in `timeouts_s` (one per stage but the last; None:
    the server's limit) gives way to the next.
    """

    stages: Annotated[tuple[Plan, ...], _LIST]
    thresholds: Annotated[tuple[Probability, ...], _LIST] = ()
    scorer: Name = "confidence"
    timeouts_s: Annotated[tuple[Timeout | None, ...], _LIST] | None = None

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if not self.stages:
            raise PlanError("cascade.stages is empty; name at least one plan")
        for name, entries in (("thresholds", self.thresholds), ("timeouts_s", self.timeouts_s)):
            if entries is not None and len(entries) != len(self.stages) - 1:
                raise PlanError(
                    f"cascade.{name} has {len(entries)} entries; {len(self.stages)} stages need "
                    f"{len(self.stages) - 1} (all but the last)"
                )
        return self


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Best:
    """Run `candidates` side by side and select one answer.

    "majority" takes the most frequent normalised answer (self-consistency, Wang et al. 2022),
    the earlier candidate on a tie; "confidence" the one with the highest geometric mean token
    probability; "scorer" the one that `scorer` finds likeliest to be right; "ranker" the one that
    wins most of its pairs, as `scorer` compares them (LLM-Blender, Jiang et al. 2023).
    """

    candidates: Annotated[tuple[Plan, ...], _LIST]
    select: Selection = "majority"
    scorer: Name = "confidence"

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if not self.candidates:
            raise PlanError("best.candidates is empty; name at least one plan")
        return self


def children(plan: Plan) -> tuple[Plan, ...]:
    """Return the plans directly inside `plan`; empty for an `Answer`."""
    if isinstance(plan, Cascade):
        return plan.stages
    if isinstance(plan, Best):
        return plan.candidates
    return ()


def with_parts(plan: Cascade | Best, parts: Mapping[int, Plan]) -> Cascade | Best:
    """Return `plan` with these parts alone, by their places; stages keep their thresholds."""
    if isinstance(plan, Best):
        return replace(plan, candidates=tuple(parts.values()))
    early = list(parts)[:-1]
    return replace(
        plan,
        stages=tuple(parts.values()),
        thresholds=tuple(plan.thresholds[place] for place in early),
        timeouts_s=plan.timeouts_s and tuple(plan.timeouts_s[place] for place in early),
    )


def with_answers(plan: Plan, change: Callable[[Answer], Answer]) -> Plan:
    """Return `plan` with what `change` makes of each of its answers."""
    if isinstance(plan, Answer):
        return change(plan)
    changed = [with_answers(child, change) for child in children(plan)]
    return with_parts(plan, dict(enumerate(changed)))


def answers(plan: Plan) -> Iterator[Answer]:
    """Yield every `Answer` in `plan`, in the order in which they would be tried."""
    if isinstance(plan, Answer):
        yield plan
    for child in children(plan):
        yield from answers(child)


def members(plan: Plan) -> tuple[str, ...]:
    """Return the distinct members that `plan` names, in order of first mention."""
    return tuple(dict.fromkeys(name for answer in answers(plan) for name in answer.members))


def num_lanes(plan: Plan) -> int:
    """Return how many members generate at the same time, at most, while `plan` runs."""
    if isinstance(plan, Answer):
        return len(plan.members)
    together = sum if isinstance(plan, Best) else max
    return together(num_lanes(child) for child in children(plan))


# More than any part of a plan has.
_MOST_KEYS: Final = 32


class PlanBounds(Settings):
    """How large a plan may be: beyond, it is refused before anything is made of it."""

    depth: int = Field(8, ge=1, le=32, description="How deep plans nest.")
    stages: int = Field(16, ge=1, description="Stages of one cascade.")
    candidates: int = Field(64, ge=1, description="Candidates of one best.")
    members: int = Field(64, ge=1, description="Members of one answer.")
    lanes: int = Field(
        1024, ge=1, description="Members named in all, and generating at once for all choices."
    )

    def check(self, data: object) -> None:
        """Raise `PlanError` if `data`, a plan's JSON, is larger; whatever it is, and however deep.

        Looks at sizes alone, without recursion: what else is wrong `from_json` tells.
        """
        todo: list[tuple[object, int]] = [(data, 1)]
        num_members = 0
        while todo:
            node, depth = todo.pop()
            if depth > self.depth:
                raise PlanError(f"plan: it nests deeper than the {self.depth} allowed")
            bodies = list(node.values()) if isinstance(node, Mapping) else []
            num_members += isinstance(node, str)
            for body in bodies:
                if isinstance(body, Mapping) and len(body) > _MOST_KEYS:
                    raise PlanError(f"plan: an object has more than {_MOST_KEYS} keys")
                for key, most in self._most_by_key(body):
                    entries = body[key]
                    if len(entries) > most:
                        raise PlanError(
                            f"plan: {key} has {len(entries)} entries; at most {most} are allowed"
                        )
                    if key in ("stages", "candidates"):
                        todo += [(entry, depth + 1) for entry in entries]
                    elif key == "members":
                        num_members += len(entries)
            if num_members > self.lanes:
                raise PlanError(f"plan: it names more than the {self.lanes} members allowed in all")

    def _most_by_key(self, body: object) -> Iterator[tuple[str, int]]:
        """Yield the lists that `body` has, and how long each may be."""
        if isinstance(body, Mapping):
            for key, most in (
                ("members", self.members),
                ("weights", self.members),
                ("stages", self.stages),
                ("thresholds", self.stages),
                ("timeouts_s", self.stages),
                ("candidates", self.candidates),
            ):
                if isinstance(body.get(key), list | tuple):
                    yield key, most


# Whoever writes a pool file may need more than strangers get.
_WIDEST = PlanBounds(depth=32, stages=1024, candidates=1024, members=1024, lanes=65_536)


def from_json(data: object, bounds: PlanBounds = _WIDEST) -> Plan:
    """Read a plan from JSON data, the inverse of `to_json`.

    A bare string is short for an `Answer` of that one member. Raises `PlanError` that names the
    key, the value and what is allowed; also for a plan larger than `bounds`.
    """
    bounds.check(data)
    return _read(data)


def to_json(plan: Plan) -> dict[str, Any]:
    """Return `plan` as JSON data: one key that names the combinator, with its fields inside."""
    if isinstance(plan, Answer):
        body: dict[str, Any] = {"members": list(plan.members), "rule": plan.rule}
        if plan.weights is not None:
            body["weights"] = list(plan.weights)
        for name in ("weighting", "gate", "contrast", "temperature", "update"):
            if getattr(plan, name) != getattr(_DEFAULTS, name):
                body[name] = getattr(plan, name)
        return {"answer": body}
    if isinstance(plan, Cascade):
        cascade: dict[str, Any] = {
            "stages": [to_json(stage) for stage in plan.stages],
            "thresholds": list(plan.thresholds),
            "scorer": plan.scorer,
        }
        if plan.timeouts_s is not None:
            cascade["timeouts_s"] = list(plan.timeouts_s)
        return {"cascade": cascade}
    best: dict[str, Any] = {
        "candidates": [to_json(candidate) for candidate in plan.candidates],
        "select": plan.select,
    }
    if plan.scorer != "confidence":
        best["scorer"] = plan.scorer
    return {"best": best}


def _read(data: object) -> Plan:
    if isinstance(data, Answer | Cascade | Best):
        return data
    if isinstance(data, str):
        data = {"answer": {"members": [data]}}
    if not isinstance(data, Mapping) or len(data) != 1:
        raise PlanError(
            f"plan: {short(data)} is not a model's name or an object with one of the keys "
            f"{', '.join(_KINDS)}"
        )
    [(kind, body)] = data.items()
    if kind not in _KINDS:
        raise PlanError(f"plan {short(kind)} is unknown; allowed are {', '.join(_KINDS)}")
    if not isinstance(body, Mapping):
        raise PlanError(f"plan.{kind}: {short(body)} is not an object")
    if kind == "answer":
        body = _with_named_weights(body)
    try:
        plan: Plan = _KINDS[kind](**{str(key): value for key, value in body.items()})
    except ValidationError as error:
        keys = [field.name for field in fields(_KINDS[kind])]
        raise PlanError(first_problem(error, where=kind, keys=keys)) from None
    return plan


def _with_named_weights(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `body` with a weighting in place of its name: {"weights": "evidence"} is short."""
    given = body.get("weights")
    if not isinstance(given, str):
        return body
    if "weighting" in body:
        raise PlanError(f"answer.weights: {short(given)} and weighting say the same; give one")
    if given not in _NAMED_WEIGHTS:
        raise PlanError(
            f"answer.weights {short(given)} is unknown; allowed are {', '.join(_NAMED_WEIGHTS)}"
        )
    return {**body, "weights": None, "weighting": _NAMED_WEIGHTS[given]}


_NAMED_WEIGHTS: dict[str, Weighting] = {
    "uniform": "static",
    "router": "router",
    "perplexity": "perplexity",
    "evidence": "evidence",
}

_KINDS: dict[str, type[Any]] = {"answer": Answer, "cascade": Cascade, "best": Best}

Plan: TypeAlias = Annotated[Answer | Cascade | Best, BeforeValidator(_read)]

for _kind in _KINDS.values():
    rebuild_dataclass(_kind, force=True)  # `Plan` has a meaning only now

PlanField: TypeAlias = Annotated[Plan, BeforeValidator(from_json)]
"""A plan among other settings, as JSON."""

_DEFAULTS = Answer(members=("any",))
