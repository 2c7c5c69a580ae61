"""Plans: which models answer a request, and how their answers combine.

Three combinators cover the ensemble literature (Lu et al. 2024, "Merge, Ensemble, and Cooperate"):

- `Answer`: one member generates (before inference), or several are fused token by token
  (during inference);
- `Cascade`: try stages in order, stop at the first answer that is good enough (after inference);
- `Best`: run candidates side by side and select one (after inference).

They nest freely, are frozen, and read from and write to JSON. This module knows nothing of how
plans run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from policies.errors import PlanError

FusionRule: TypeAlias = Literal["mixture", "product"]
Selection: TypeAlias = Literal["majority", "confidence"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Generate with one member, or fuse several at every token.

    `weights` are relative (they need not sum to one); `None` means uniform. With `rule`
    "mixture" the next-token distribution is Σ w_m p_m; with "product" it is Π p_m^w_m,
    renormalised (product of experts).
    """

    members: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    rule: FusionRule = "mixture"

    def __post_init__(self) -> None:
        if not self.members:
            raise PlanError("answer.members is empty; name at least one model")
        if len(set(self.members)) != len(self.members):
            raise PlanError(f"answer.members names a model twice: {list(self.members)}")
        if self.rule not in get_args(FusionRule):
            raise PlanError(_not_among("answer.rule", self.rule, get_args(FusionRule)))
        if self.weights is None:
            return
        if len(self.weights) != len(self.members):
            raise PlanError(
                f"answer.weights has {len(self.weights)} entries for {len(self.members)} members"
            )
        if any(not math.isfinite(w) or w < 0 for w in self.weights) or sum(self.weights) <= 0:
            raise PlanError(
                f"answer.weights {list(self.weights)}: allowed are finite numbers >= 0, "
                "not all of them zero"
            )


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """Run `stages` in order; stop when the answer's P(correct) reaches that stage's threshold.

    `thresholds` has one entry per stage but the last, each in [0, 1]; the last stage's answer is
    always accepted. `scorer` names the model of P(correct | query, answer); "confidence" is the
    geometric mean of the answer's token probabilities, which needs no training
    (FrugalGPT, Chen et al. 2023, section 3).
    """

    stages: tuple[Plan, ...]
    thresholds: tuple[float, ...]
    scorer: str = "confidence"

    def __post_init__(self) -> None:
        if not self.stages:
            raise PlanError("cascade.stages is empty; name at least one plan")
        if len(self.thresholds) != len(self.stages) - 1:
            raise PlanError(
                f"cascade.thresholds has {len(self.thresholds)} entries; "
                f"{len(self.stages)} stages need {len(self.stages) - 1} (all but the last)"
            )
        for threshold in self.thresholds:
            if not 0 <= threshold <= 1:
                raise PlanError(f"cascade.thresholds: {threshold} is not in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class Best:
    """Run `candidates` side by side and select one answer.

    "majority" takes the most frequent normalised answer (self-consistency, Wang et al. 2022),
    the earlier candidate on a tie; "confidence" the one with the highest geometric mean token
    probability.
    """

    candidates: tuple[Plan, ...]
    select: Selection = "majority"

    def __post_init__(self) -> None:
        if not self.candidates:
            raise PlanError("best.candidates is empty; name at least one plan")
        if self.select not in get_args(Selection):
            raise PlanError(_not_among("best.select", self.select, get_args(Selection)))


Plan: TypeAlias = Answer | Cascade | Best


def children(plan: Plan) -> tuple[Plan, ...]:
    """Return the plans directly inside `plan`; empty for an `Answer`."""
    if isinstance(plan, Cascade):
        return plan.stages
    if isinstance(plan, Best):
        return plan.candidates
    return ()


def answers(plan: Plan) -> Iterator[Answer]:
    """Yield every `Answer` in `plan`, in the order in which they would be tried."""
    if isinstance(plan, Answer):
        yield plan
    for child in children(plan):
        yield from answers(child)


def members(plan: Plan) -> tuple[str, ...]:
    """Return the distinct members that `plan` names, in order of first mention."""
    return tuple(dict.fromkeys(name for answer in answers(plan) for name in answer.members))


def to_json(plan: Plan) -> dict[str, Any]:
    """Return `plan` as JSON data: one key that names the combinator, with its fields inside."""
    if isinstance(plan, Answer):
        body: dict[str, Any] = {"members": list(plan.members), "rule": plan.rule}
        if plan.weights is not None:
            body["weights"] = list(plan.weights)
        return {"answer": body}
    if isinstance(plan, Cascade):
        return {
            "cascade": {
                "stages": [to_json(stage) for stage in plan.stages],
                "thresholds": list(plan.thresholds),
                "scorer": plan.scorer,
            }
        }
    return {
        "best": {
            "candidates": [to_json(candidate) for candidate in plan.candidates],
            "select": plan.select,
        }
    }


def from_json(data: object) -> Plan:
    """Read a plan from JSON data, the inverse of `to_json`.

    A bare string is short for an `Answer` of that one member. Raises `PlanError` that names the
    key, the value and what is allowed.
    """
    if isinstance(data, str):
        return Answer(members=(data,))
    if not isinstance(data, Mapping) or len(data) != 1:
        raise PlanError(
            f"plan: {data!r} is not a model's name or an object with one of the keys "
            "answer, cascade, best"
        )
    [(kind, body)] = data.items()
    if kind not in _READERS:
        raise PlanError(_not_among("plan", kind, tuple(_READERS)))
    if not isinstance(body, Mapping):
        raise PlanError(f"plan.{kind}: {body!r} is not an object")
    reader, allowed = _READERS[kind]
    for key in body:
        if key not in allowed:
            raise PlanError(_not_among(f"plan.{kind}: key", key, allowed))
    if allowed[0] not in body:
        raise PlanError(f"plan.{kind}: the key {allowed[0]!r} is missing")
    plan: Plan = reader(body)
    return plan


def _read_answer(body: Mapping[str, Any]) -> Answer:
    members_ = _list(body, "members", "answer")
    if not all(isinstance(name, str) for name in members_):
        raise PlanError(f"answer.members: {members_!r} is not a list of names")
    weights = body.get("weights")
    return Answer(
        members=tuple(members_),
        weights=None if weights is None else _numbers(body, "weights", "answer"),
        rule=body.get("rule", "mixture"),
    )


def _read_cascade(body: Mapping[str, Any]) -> Cascade:
    scorer = body.get("scorer", "confidence")
    if not isinstance(scorer, str):
        raise PlanError(f"cascade.scorer: {scorer!r} is not a name")
    return Cascade(
        stages=tuple(from_json(stage) for stage in _list(body, "stages", "cascade")),
        thresholds=_numbers(body, "thresholds", "cascade"),
        scorer=scorer,
    )


def _read_best(body: Mapping[str, Any]) -> Best:
    return Best(
        candidates=tuple(from_json(item) for item in _list(body, "candidates", "best")),
        select=body.get("select", "majority"),
    )


_READERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "answer": (_read_answer, ("members", "weights", "rule")),
    "cascade": (_read_cascade, ("stages", "thresholds", "scorer")),
    "best": (_read_best, ("candidates", "select")),
}


def _list(body: Mapping[str, Any], key: str, owner: str) -> list[Any]:
    value = body.get(key, [])
    if not isinstance(value, list | tuple):
        raise PlanError(f"{owner}.{key}: {value!r} is not a list")
    return list(value)


def _numbers(body: Mapping[str, Any], key: str, owner: str) -> tuple[float, ...]:
    values = _list(body, key, owner)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PlanError(f"{owner}.{key}: {value!r} is not a number")
    return tuple(float(value) for value in values)


def _not_among(what: str, value: object, allowed: tuple[str, ...]) -> str:
    return f"{what} {value!r} is unknown; allowed are {', '.join(allowed)}"
