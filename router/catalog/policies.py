"""The pool's policies by name, with the scorers and targets that they bring along.

Every plan that one of them may choose is checked here, when the pool loads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from models.pool import Pool
from policies.base import ModelFacts, Policy
from policies.budget.controller import Controller
from policies.cascade.base import Confidence, PromptScorer, Ranker, Scorer, build_scorer
from policies.errors import PolicyError
from policies.fixed import always
from policies.kinds import short
from policies.plan import Answer, Best, Cascade, Plan, answers, children, from_json, members
from policies.registry import BuildContext
from policies.standins import StandInFacts, StandIns, stand_in
from router.catalog.members import Members

DEFAULT_POLICY = "auto"
CONFIDENCE = "confidence"

STAY_MARGIN = 0.05
"""How much higher another model's predicted quality must be to take over a conversation."""

# What every policy of a pool may have beside its kind's own keys.
_SHARED_KEYS = ("fallback", "stay_margin")


class Policies(Mapping[str, Policy]):
    """Policies by name.

    `scorers` are those that plans may name. By the policies' names: `controllers` hold their
    targets, `fallbacks` are the plans that take over where one fails, `margins` the gains for which
    they change who answers a conversation. The `limiter` trims to a request's ceilings what a
    policy chooses that knows no limits.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        specs: Mapping[str, Mapping[str, Any]],
        members: Members,
        models: Mapping[str, ModelFacts],
    ) -> None:
        """Build what `specs` describe, and an `auto` of the first model where they have none.

        Raises `PolicyError` that names the policy, also for a plan that cannot run on this pool.
        """
        self._members = members
        self._stand_ins = {name: model.otherwise for name, model in pool.absent.items()}
        self.scorers: dict[str, Scorer] = {CONFIDENCE: Confidence(), **_build_scorers(pool)}
        self.controllers: dict[str, Controller] = {}
        self.fallbacks: dict[str, tuple[Plan, ...]] = {}
        self.margins: dict[str, float] = {}
        self.limiter = Controller(models=models, clock=time.time)
        encoders = [name for name in models if members.encodes(name)]
        self._context = BuildContext(
            folder=pool.folder,
            models=StandInFacts(models, self._stand_ins, left_out=encoders),
            scorers=self.scorers,
            reserved=frozenset(self.scorers),
        )
        if DEFAULT_POLICY not in specs:
            specs = {DEFAULT_POLICY: {"kind": "fixed", "plan": members.first}, **specs}
        # The default comes first: its predictions fill in the weights that others leave open.
        self.default = self._build(DEFAULT_POLICY, specs[DEFAULT_POLICY])
        self._by_name = {
            name: self.default if name == DEFAULT_POLICY else self._build(name, spec)
            for name, spec in specs.items()
        }
        for name, policy in self._by_name.items():
            # A plan may name a scorer that another policy brings along, so all are built first.
            with _at(f"policies.{name}"):
                for plan in (*policy.plans(), *self.fallbacks[name]):
                    self.check(plan)

    def __getitem__(self, name: str) -> Policy:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def fixed(self, plan: Plan) -> Policy:
        """Return the policy that always takes `plan`, which `check` has passed.

        Weights that wait for a router get the default policy's predictions.
        """
        return always(plan, router=self.default)

    def check(self, plan: Plan) -> None:
        """Raise `PolicyError` if `plan` cannot run on this pool, saying why."""
        for answer in answers(plan):
            self._members.check_answer(answer)
        self._check_scorers(plan)

    def _check_scorers(self, plan: Plan) -> None:
        if isinstance(plan, Answer):
            return
        kind = "cascade" if isinstance(plan, Cascade) else "best"
        if plan.scorer not in self.scorers:
            raise PolicyError(
                f"{kind}.scorer: {plan.scorer!r} is unknown; "
                f"allowed are {', '.join(sorted(self.scorers))}"
            )
        ranks = isinstance(plan, Best) and plan.select == "ranker"
        if ranks and not isinstance(self.scorers[plan.scorer], Ranker):
            rankers = [name for name, s in self.scorers.items() if isinstance(s, Ranker)]
            raise PolicyError(
                f"best.scorer: {plan.scorer!r} cannot rank answers in pairs; "
                f"allowed are {', '.join(sorted(rankers)) or 'none of this pool'}"
            )
        judged = plan.stages[:-1] if isinstance(plan, Cascade) else plan.candidates
        if isinstance(plan, Cascade) or plan.select != "majority":
            for name in dict.fromkeys(name for stage in judged for name in members(stage)):
                self._members.check_tells(name, "judges answers of")
        if isinstance(plan, Cascade) and isinstance(self.scorers[plan.scorer], PromptScorer):
            for stage in judged:
                if len(named := members(stage)) > 1:
                    raise PolicyError(
                        f"cascade.scorer: {plan.scorer!r} judges by what one model makes of the "
                        f"prompt, and a stage has {', '.join(named)}"
                    )
                self._members.check_reads(named[0])
        for child in children(plan):
            self._check_scorers(child)

    def _build(self, name: str, spec: Mapping[str, Any]) -> Policy:
        default = None if name == DEFAULT_POLICY else self.default
        context = replace(self._context, default=default, controllers=[])
        own = {key: value for key, value in spec.items() if key not in _SHARED_KEYS}
        with _at(f"policies.{name}"):
            policy = context.build(own)
            self.fallbacks[name] = self._read_fallback(spec.get("fallback", []))
            self.margins[name] = _read_margin(spec.get("stay_margin", STAY_MARGIN))
        if self._stand_ins:
            policy = StandIns(policy, self._stand_ins)
        for controller in context.controllers:
            self.controllers[name] = controller
        return policy

    def _read_fallback(self, data: object) -> tuple[Plan, ...]:
        if not isinstance(data, list):
            raise PolicyError(f"fallback: {short(data)} is not a list of models or plans")
        return tuple(stand_in(from_json(plan), self._stand_ins) for plan in data)


def _read_margin(data: object) -> float:
    if isinstance(data, bool) or not isinstance(data, int | float) or not 0 <= data <= 1:
        raise PolicyError(f"stay_margin: {short(data)} is not a number in [0, 1]")
    return float(data)


def _build_scorers(pool: Pool) -> dict[str, Scorer]:
    scorers: dict[str, Scorer] = {}
    for name, spec in pool.scorers.items():
        if name == CONFIDENCE:
            raise PolicyError(f"scorers: the name {CONFIDENCE!r} is reserved")
        with _at(f"scorers.{name}"):
            scorers[name] = build_scorer(spec, folder=pool.folder)
    return scorers


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Say in a `PolicyError` where in the pool or the configuration it stands."""
    try:
        yield
    except PolicyError as error:
        raise PolicyError(f"{where}: {error}") from None
