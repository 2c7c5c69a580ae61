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

FusionRule: TypeAlias = Literal["mixture", "product", "gated", "contrastive"]
Weighting: TypeAlias = Literal["static", "router", "perplexity", "evidence"]
Selection: TypeAlias = Literal["majority", "confidence", "scorer", "ranker"]


@dataclass(frozen=True, kw_only=True)
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

    members: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    rule: FusionRule = "mixture"
    weighting: Weighting = "static"
    gate: float = 0.9
    contrast: float = 0.5
    temperature: float | None = None
    update: bool = False

    def __post_init__(self) -> None:
        if not self.members:
            raise PlanError("answer.members is empty; name at least one model")
        if len(set(self.members)) != len(self.members):
            raise PlanError(f"answer.members names a model twice: {list(self.members)}")
        if self.rule not in get_args(FusionRule):
            raise PlanError(_not_among("answer.rule", self.rule, get_args(FusionRule)))
        if not 0 <= self.gate <= 1:
            raise PlanError(f"answer.gate: {self.gate} is not in [0, 1]")
        if not 0 <= self.contrast <= 10:
            raise PlanError(f"answer.contrast: {self.contrast} is not in [0, 10]")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise PlanError(f"answer.temperature: {self.temperature} is not a finite number > 0")
        if self.weights is not None:
            _check_relative("answer.weights", self.weights, len(self.members))
        if self.weighting not in get_args(Weighting):
            raise PlanError(_not_among("answer.weighting", self.weighting, get_args(Weighting)))
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
            self._check_contrastive()

    def _check_contrastive(self) -> None:
        if len(self.members) not in (2, 3):
            raise PlanError(
                "answer.rule 'contrastive' needs two members (expert, anti-expert) or three "
                f"(base, expert, anti-expert), got {len(self.members)}"
            )
        if self.weights is not None or self.weighting != "static":
            raise PlanError("answer.weights: the rule 'contrastive' takes none; see contrast")


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """Run `stages` in order; stop when the answer's P(correct) reaches that stage's threshold.

    `thresholds` has one entry per stage but the last, each in [0, 1]; the last stage's answer is
    always accepted. `scorer` names the model of P(correct | query, answer); "confidence" is the
    geometric mean of the answer's token probabilities, which needs no training
    (FrugalGPT, Chen et al. 2023, section 3). A stage that takes longer than its entry in
    `timeouts_s` (one per stage but the last; None: the server's limit) gives way to the next.
    """

    stages: tuple[Plan, ...]
    thresholds: tuple[float, ...]
    scorer: str = "confidence"
    timeouts_s: tuple[float | None, ...] | None = None

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
        if self.timeouts_s is None:
            return
        if len(self.timeouts_s) != len(self.stages) - 1:
            raise PlanError(
                f"cascade.timeouts_s has {len(self.timeouts_s)} entries; {len(self.stages)} stages "
                f"need {len(self.stages) - 1} (all but the last, which has the rest of the time)"
            )
        for timeout_s in self.timeouts_s:
            if timeout_s is not None and not 0 < timeout_s < math.inf:
                raise PlanError(f"cascade.timeouts_s: {timeout_s} is not a finite number > 0")


@dataclass(frozen=True, kw_only=True)
class Best:
    """Run `candidates` side by side and select one answer.

    "majority" takes the most frequent normalised answer (self-consistency, Wang et al. 2022),
    the earlier candidate on a tie; "confidence" the one with the highest geometric mean token
    probability; "scorer" the one that `scorer` finds likeliest to be right; "ranker" the one that
    wins most of its pairs, as `scorer` compares them (LLM-Blender, Jiang et al. 2023).
    """

    candidates: tuple[Plan, ...]
    select: Selection = "majority"
    scorer: str = "confidence"

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
    given = body.get("weights")
    weighting = body.get("weighting", _DEFAULTS.weighting)
    weights: tuple[float, ...] | None = None
    if isinstance(given, str):
        # Short for weights that are found: {"weights": "evidence"}.
        if "weighting" in body:
            raise PlanError(f"answer.weights: {given!r} and weighting say the same; give one")
        if given not in _NAMED_WEIGHTS:
            raise PlanError(_not_among("answer.weights", given, tuple(_NAMED_WEIGHTS)))
        weighting = _NAMED_WEIGHTS[given]
    elif given is not None:
        weights = _numbers(body, "weights", "answer")
    temperature, update = body.get("temperature"), body.get("update", False)
    if not isinstance(update, bool):
        raise PlanError(f"answer.update: {update!r} is not true or false")
    return Answer(
        members=tuple(members_),
        weights=weights,
        rule=body.get("rule", _DEFAULTS.rule),
        weighting=weighting,
        gate=_number(body.get("gate", _DEFAULTS.gate), "answer.gate"),
        contrast=_number(body.get("contrast", _DEFAULTS.contrast), "answer.contrast"),
        temperature=None if temperature is None else _number(temperature, "answer.temperature"),
        update=update,
    )


def _read_cascade(body: Mapping[str, Any]) -> Cascade:
    return Cascade(
        stages=tuple(from_json(stage) for stage in _list(body, "stages", "cascade")),
        thresholds=_numbers(body, "thresholds", "cascade"),
        scorer=_scorer(body, "cascade"),
        timeouts_s=_timeouts_s(body),
    )


def _read_best(body: Mapping[str, Any]) -> Best:
    return Best(
        candidates=tuple(from_json(item) for item in _list(body, "candidates", "best")),
        select=body.get("select", "majority"),
        scorer=_scorer(body, "best"),
    )


_READERS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "answer": (
        _read_answer,
        ("members", "weights", "rule", "weighting", "gate", "contrast", "temperature", "update"),
    ),
    "cascade": (_read_cascade, ("stages", "thresholds", "scorer", "timeouts_s")),
    "best": (_read_best, ("candidates", "select", "scorer")),
}
_DEFAULTS = Answer(members=("any",))
_NAMED_WEIGHTS: dict[str, Weighting] = {
    "uniform": "static",
    "router": "router",
    "perplexity": "perplexity",
    "evidence": "evidence",
}


def _list(body: Mapping[str, Any], key: str, owner: str) -> list[Any]:
    value = body.get(key, [])
    if not isinstance(value, list | tuple):
        raise PlanError(f"{owner}.{key}: {value!r} is not a list")
    return list(value)


def _numbers(body: Mapping[str, Any], key: str, owner: str) -> tuple[float, ...]:
    return tuple(_number(value, f"{owner}.{key}") for value in _list(body, key, owner))


def _timeouts_s(body: Mapping[str, Any]) -> tuple[float | None, ...] | None:
    if body.get("timeouts_s") is None:
        return None
    return tuple(
        None if value is None else _number(value, "cascade.timeouts_s")
        for value in _list(body, "timeouts_s", "cascade")
    )


def _number(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlanError(f"{where}: {value!r} is not a number")
    return float(value)


def _scorer(body: Mapping[str, Any], owner: str) -> str:
    scorer = body.get("scorer", "confidence")
    if not isinstance(scorer, str):
        raise PlanError(f"{owner}.scorer: {scorer!r} is not a name")
    return scorer


def _check_relative(what: str, weights: tuple[float, ...], num_members: int) -> None:
    if len(weights) != num_members:
        raise PlanError(f"{what} has {len(weights)} entries for {num_members} members")
    if any(not math.isfinite(w) or w < 0 for w in weights) or sum(weights) <= 0:
        raise PlanError(
            f"{what} {list(weights)}: allowed are finite numbers >= 0, not all of them zero"
        )


def _not_among(what: str, value: object, allowed: tuple[str, ...]) -> str:
    return f"{what} {value!r} is unknown; allowed are {', '.join(allowed)}"
