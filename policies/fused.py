"""Fuse several members at every token, with the router's prediction as the prior of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from policies.base import Decision, Policy, Query
from policies.errors import PolicyError
from policies.footprint import Footprint
from policies.kinds import Settings
from policies.plan import Answer, Plan, answers, from_json, with_answers
from policies.registry import BuildContext, PolicyKind

# A member that the router expects nothing of still counts a little: evidence may know better.
_LEAST_WEIGHT = 1e-3


class Fused(Policy):
    """Fuses the `top` members of `answer` that the router expects most of, at every token.

    `answer` says how: its rule, and its weighting, for which `router`'s scores become the prior
    ("router", "evidence"). `top` None fuses all of them; `prior_power` sharpens (> 1) or flattens
    (< 1) the prior. Raises `PolicyError` for values that make no sense.
    """

    def __init__(
        self,
        answer: Answer,
        *,
        router: Policy | None = None,
        top: int | None = None,
        prior_power: float = 1.0,
    ) -> None:
        if top is not None and not 1 <= top <= len(answer.members):
            raise PolicyError(f"fused.top: {top} is not in [1, {len(answer.members)}]")
        if router is None and (top is not None or needs_prior(answer)):
            raise PolicyError("fused.router is missing; top and weights by router need one")
        if top is not None and answer.weights is not None:
            raise PolicyError("fused.weights: numbers per member do not go together with top")
        self._answer = answer
        self._router = router
        self._top = top
        self._prior_power = prior_power

    def decide(self, query: Query) -> Decision:
        """Return the fused answer for `query`."""
        if self._router is None:
            return Decision(plan=self._answer, reason="fixed fusion")
        routed = self._router.decide(query)
        self._router.settle(query, routed, Footprint())
        scores = routed.scores
        answer = best_members(self._answer, scores, self._top)
        plan = with_prior(answer, scores, power=self._prior_power)
        return Decision(
            plan=plan,
            scores={name: scores[name] for name in answer.members if name in scores},
            reason=f"fusion of {', '.join(answer.members)}, weighted by {answer.weighting}",
            familiar=routed.familiar,
        )

    def plans(self) -> Iterable[Plan]:
        """Return the whole fusion, before members are left out and weights filled in."""
        return (self._answer,)


def _read_answer(data: object) -> Plan:
    return from_json({"answer": data})


class FusedSettings(Settings):
    """`answer` is an answer's body in JSON, `router` the specification of what predicts."""

    answer: Annotated[Answer, BeforeValidator(_read_answer)]
    router: Mapping[str, Any] | None = None
    top: int | None = Field(None, ge=1)
    prior_power: float = Field(1.0, ge=0, le=100)


def _build(settings: FusedSettings, context: BuildContext) -> Policy:
    router = settings.router
    return Fused(
        settings.answer,
        router=None if router is None else context.nested(router),
        top=settings.top,
        prior_power=settings.prior_power,
    )


KIND = PolicyKind(settings=FusedSettings, build=_build)


def best_members(answer: Answer, scores: Mapping[str, float], top: int | None) -> Answer:
    """Return `answer` with only the `top` best-scored of its members, the best first; None: all."""
    if top is None or top >= len(answer.members):
        return answer
    # A contrast's members have roles and never come with top: they take no router.
    ranked = sorted(answer.members, key=lambda name: -scores.get(name, 0.0))
    return replace(answer, members=tuple(ranked[:top]))


def needs_prior(plan: Plan) -> bool:
    """Return whether some answer's weights wait for the router."""
    return any(map(_waits, answers(plan)))


def _waits(answer: Answer) -> bool:
    return answer.weighting in ("router", "evidence") and answer.weights is None


def with_prior(plan: Plan, scores: Mapping[str, float], *, power: float = 1.0) -> Plan:
    """Return `plan` with the router's `scores` as weights, wherever some wait for it.

    Weights are score^power, normalised; a member without a score gets the mean of the others.
    Without any scores they stay uniform.
    """

    def weighed(answer: Answer) -> Answer:
        known = [scores[name] for name in answer.members if name in scores]
        if not _waits(answer) or not known:
            return answer
        mean = sum(known) / len(known)
        raw = [max(scores.get(name, mean), _LEAST_WEIGHT) ** power for name in answer.members]
        return replace(answer, weights=tuple(weight / sum(raw) for weight in raw))

    return with_answers(plan, weighed)


def without_prior(plan: Plan) -> Plan:
    """Return `plan` as it was before `with_prior`: scorers know stages by that."""

    def waiting(answer: Answer) -> Answer:
        filled = answer.weighting in ("router", "evidence") and answer.weights is not None
        return replace(answer, weights=None) if filled else answer

    return with_answers(plan, waiting)
