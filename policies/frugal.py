"""The FrugalGPT cascade (Chen et al. 2023), learned offline, made contextual per query."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from pydantic import Field

from policies.base import Decision, Policy, Query
from policies.cascade.learned import (
    ROUTED,
    CascadePoint,
    LearnedCascade,
    load_cascade,
    within_budget,
)
from policies.cascade.scorer import LearnedScorer
from policies.footprint import Footprint
from policies.fused import best_members, with_prior
from policies.kinds import Settings
from policies.plan import Answer, Cascade, Name, Plan, Timeout, members
from policies.registry import BuildContext, PolicyKind


@dataclass(frozen=True)
class _Stage:
    name: str
    plan: Plan
    threshold: float


class Frugal(Policy):
    """Runs one chain of a learned cascade's frontier.

    For each query the router's choice takes the place of a routed stage, stages whose prior
    P(correct | query) lies below their gate are skipped, and so is a stage that a later one
    repeats. `budget_usd` is the mean cost per query that picks the chain from the frontier; None
    takes the one that training picked. `scorer` is the name under which plans (and clients) refer
    to the scorer. A stage that takes longer than `stage_timeout_s` gives way to the next (None: the
    server's own limit). It predicts the quality of `models` alone (None: of every stage). A query
    that the policy `outside` gives to a model that no stage has goes there. Raises
    `PolicyError` for a budget below the cheapest chain.
    """

    def __init__(
        self,
        cascade: LearnedCascade,
        *,
        scorer: str = "cascade",
        budget_usd: float | None = None,
        stage_timeout_s: float | None = None,
        models: Collection[str] | None = None,
        outside: Policy | None = None,
    ) -> None:
        self._outside = outside
        self._known = frozenset(chain(*map(members, cascade.plans.values())))
        self.scorer = LearnedScorer(cascade.weights, cascade.plans, cascade.top)
        self._cascade = cascade
        self._scorer_name = scorer
        # What is predicted of single members, by the stages that they are.
        self._alone = {
            name: plan.members[0]
            for name, plan in cascade.plans.items()
            if isinstance(plan, Answer)
            and len(plan.members) == 1
            and (models is None or plan.members[0] in models)
        }
        self._stage_timeout_s = stage_timeout_s
        self._point = (
            cascade.frontier[cascade.chosen]
            if budget_usd is None
            else within_budget(cascade.frontier, budget_usd)
        )

    @property
    def point(self) -> CascadePoint:
        """The chain in use, with the accuracy and cost that training measured."""
        return self._point

    def decide(self, query: Query) -> Decision:
        """Return the chain for `query`, or the plan of `outside`."""
        if self._outside is not None:
            elsewhere = self._outside.decide(query)
            if self._is_elsewhere(elsewhere.plan):
                return elsewhere
            self._outside.settle(query, elsewhere, Footprint())
        priors = self.scorer.priors(query.text)
        scores = {member: priors[name] for name, member in self._alone.items()}
        kept, skipped = self._resolve(priors, scores)
        plan = self._chain([stage.plan for stage in kept], [stage.threshold for stage in kept[:-1]])
        names = " -> ".join(stage.name for stage in kept)
        reason = f"the cheapest chain within the budget: {names}"
        if skipped:
            reason += f"; skipped {', '.join(skipped)}"
        return Decision(
            plan=plan,
            scores=scores,
            reason=reason,
            details={"expected_accuracy": self._point.accuracy, "mean_usd": self._point.cost},
        )

    def plans(self) -> Iterable[Plan]:
        """Return the chain with every plan that its routed stages may stand for."""
        *early, last = [
            self._cascade.routed if stage == ROUTED else (stage,) for stage in self._point.stages
        ]
        for final in last:
            judged = [name for name in dict.fromkeys(chain(*early)) if name != final]
            stages = [self._cascade.plans[name] for name in (*judged, final)]
            yield self._chain(stages, [0.0] * len(judged))
        if self._outside is not None:
            yield from filter(self._is_elsewhere, self._outside.plans())

    def settle(self, query: Query, decision: Decision, cost: Footprint) -> None:
        """Tell `outside` of what it decided."""
        if self._outside is not None and self._is_elsewhere(decision.plan):
            self._outside.settle(query, decision, cost)

    def _is_elsewhere(self, plan: Plan) -> bool:
        """Return whether `plan` needs a model that no stage has."""
        return not self._known.issuperset(members(plan))

    def _chain(self, stages: Sequence[Plan], thresholds: Sequence[float]) -> Plan:
        """Return the cascade of `stages`; a single one is no cascade."""
        if len(stages) == 1:
            return stages[0]
        limit_s = self._stage_timeout_s
        return Cascade(
            stages=tuple(stages),
            thresholds=tuple(thresholds),
            scorer=self._scorer_name,
            timeouts_s=None if limit_s is None else (limit_s,) * len(thresholds),
        )

    def _plan(self, name: str, scores: Mapping[str, float]) -> Plan:
        """Return a stage's plan; a fusion takes its members and weights from their `scores`."""
        plan = self._cascade.plans[name]
        if isinstance(plan, Answer):
            plan = best_members(plan, scores, self._cascade.top.get(name))
        return with_prior(plan, scores, power=self._cascade.prior_power)

    def _resolve(
        self, priors: Mapping[str, float], scores: Mapping[str, float]
    ) -> tuple[list[_Stage], list[str]]:
        """Return the stages that run for these priors, and why the others do not."""
        point = self._point
        names = [
            max(self._cascade.routed, key=priors.__getitem__) if stage == ROUTED else stage
            for stage in point.stages
        ]
        kept: list[_Stage] = []
        skipped: list[str] = []
        for j, name in enumerate(names):
            last = j == len(names) - 1
            if name in names[j + 1 :]:
                continue
            if not last and priors[name] < point.gates[j]:
                skipped.append(f"{name} (P {priors[name]:.2f} < {point.gates[j]:.2f})")
                continue
            threshold = 0.0 if last else point.thresholds[j]
            kept.append(_Stage(name=name, plan=self._plan(name, scores), threshold=threshold))
        return kept, skipped


class FrugalSettings(Settings):
    """`path` is the cascade's file, relative to the pool, `outside` a policy's specification; the
    others are `Frugal`'s."""

    path: str
    scorer: Name = "cascade"
    budget_usd_per_1000: float | None = Field(None, ge=0)
    stage_timeout_s: Timeout | None = None
    outside: Mapping[str, Any] | None = None


def _build(settings: FrugalSettings, context: BuildContext) -> Policy:
    budget = settings.budget_usd_per_1000
    policy = Frugal(
        load_cascade(context.folder / settings.path),
        scorer=settings.scorer,
        budget_usd=None if budget is None else budget / 1000,
        stage_timeout_s=settings.stage_timeout_s,
        models=context.models,
        outside=None if settings.outside is None else context.nested(settings.outside),
    )
    context.bring_scorer(settings.scorer, policy.scorer)
    return policy


KIND = PolicyKind(settings=FrugalSettings, build=_build)
