"""What can be asked for: the pool's models and policies by the names that clients use.

Everything that a pool or configuration can get wrong about names is found when this is built.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

from models.engines.registry import engine_traits
from models.errors import PoolError, RequestError
from models.pool import Pool
from models.tokenizer import Tokenizer, load_tokenizer
from policies.base import Policy
from policies.budget import Controller
from policies.building import BuildContext
from policies.carbon.grid import GridReading
from policies.carbon.live import LiveModels
from policies.carbon.settings import CarbonSettings
from policies.cascade.base import Confidence, Ranker, Scorer
from policies.cascade.registry import build_scorer
from policies.errors import PolicyError
from policies.fixed import Fixed
from policies.footprint import Rates
from policies.fused import always
from policies.plan import Answer, Best, Cascade, Plan, answers, children, members
from policies.registry import build_in

DEFAULT_POLICY = "auto"
CONFIDENCE = "confidence"
_POLICY_PREFIX = "policy/"


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a served name stands for; `policy_name` is None where the client named a model."""

    policy: Policy
    policy_name: str | None


class Catalog:
    """Names, tokenizers, prices and scorers of one pool."""

    def __init__(
        self,
        pool: Pool,
        *,
        policies: Mapping[str, Mapping[str, Any]] | None = None,
        scorers: Mapping[str, Scorer] | None = None,
        carbon: CarbonSettings | None = None,
    ) -> None:
        """Check `pool` and the `policies` added to its own; `carbon` prices energy and carbon.

        Raises `PoolError` (also for a plan that no engine can run) and `PolicyError`.
        """
        self.pool = pool
        self.scorers: dict[str, Scorer] = {
            CONFIDENCE: Confidence(),
            **_build_scorers(pool),
            **(scorers or {}),
        }
        self._engine_of = {model.name: model.spec.engine for model in pool.models}
        self._traits = {
            engine.name: engine_traits(engine, pool.models_of(engine.name))
            for engine in pool.engines
        }
        carbon = carbon or CarbonSettings()
        # Its readings follow a live feed, where one is configured and started.
        self.grid = carbon.grid(pool.folder)
        self.facts = LiveModels(
            pool.facts(),
            engine_of=self._engine_of,
            settings=carbon,
            grid=self.grid,
            clock=time.time,
        )
        # Trims what a policy without a budget of its own chooses to a request's ceilings.
        self.limiter = Controller(models=self.facts, clock=time.time)
        self._tokenizers = _load_tokenizers(pool)
        # What holds the targets of policies, by the policies' names.
        self.controllers: dict[str, Controller] = {}
        self.policies = self._build_policies({**pool.policies, **(policies or {})})
        self._targets = self._build_targets()
        self.fingerprint = self._fingerprint()
        self.created_s = int(time.time())

    @property
    def tokenizer(self) -> Tokenizer:
        """The pool's first model's tokenizer; policies count prompt tokens with it."""
        return self._tokenizers[self.pool.models[0].name]

    @property
    def rates(self) -> Mapping[str, Rates]:
        """What each model costs per token, at the grid's present intensity."""
        return self.facts.rates()

    def grid_reading(self) -> GridReading:
        """Return the grid's present intensity and where the figure comes from."""
        return self.grid.at(time.time())

    def names(self) -> tuple[str, ...]:
        """Return every name a client may ask for, the default policy first."""
        return tuple(self._targets)

    def resolve(self, name: str) -> Target | None:
        """Return what `name` stands for, or None if nothing does."""
        return self._targets.get(name)

    def resolve_policy(self, name: str) -> Target | None:
        """Return the policy called `name`, without the prefix that model names need."""
        policy = self.policies.get(name)
        return None if policy is None else Target(policy=policy, policy_name=name)

    def engine_of_model(self, name: str) -> str:
        """Return the engine that runs the model called `name`."""
        return self._engine_of[name]

    def engines_with_metrics(self) -> tuple[str, ...]:
        """Return the engines whose libraries have metrics of their own."""
        return tuple(name for name, traits in self._traits.items() if traits.metrics)

    def engine_of(self, answer: Answer) -> str:
        """Return the engine that runs `answer`; its plan has been checked."""
        return self._engine_of[answer.members[0]]

    def spans_engines(self, answer: Answer) -> bool:
        """Return whether no single engine can fuse the members of `answer`."""
        engines = {self._engine_of[name] for name in answer.members}
        alone = len(answer.members) == 1
        return not alone and (len(engines) > 1 or not self._traits[engines.pop()].fuses)

    def tokenizer_of(self, answer: Answer) -> Tokenizer:
        """Return the tokenizer of `answer`'s members."""
        return self._tokenizers[answer.members[0]]

    def context_tokens(self, answer: Answer) -> int | None:
        """Return the shortest context of `answer`'s members; None where it isn't known."""
        known = [self.pool.model(name).context_tokens for name in answer.members]
        known += [self._traits[self._engine_of[name]].context_tokens for name in answer.members]
        return min((tokens for tokens in known if tokens is not None), default=None)

    def check(self, plan: Plan) -> None:
        """Raise `PolicyError` if `plan` cannot run on this pool, saying why."""
        for name in members(plan):
            if name not in self.facts:
                raise PolicyError(
                    f"the plan names the model {name!r}, which the pool lacks; "
                    f"it has {', '.join(self.facts)}"
                )
        for answer in answers(plan):
            simple = answer.rule in ("mixture", "product") and answer.weighting in (
                "static",
                "router",
            )
            if not self.spans_engines(answer):
                self._check_fusion(answer)
                continue
            if not simple:
                raise PolicyError(
                    f"the plan fuses {', '.join(answer.members)}, which no one engine runs "
                    "together: there only the rules mixture and product are known, and weights "
                    "that are given or the router's"
                )
            for name in answer.members:
                self._check_tells(name, "fuses")
                if self.pool.model(name).spec.remote and self.pool.model(name).tokenizer is None:
                    raise PolicyError(
                        f"the plan fuses {name!r}, whose tokenizer nobody knows; "
                        f"models.{name}.remote.tokenizer must name it"
                    )
        self._check_scorers(plan)

    def _check_fusion(self, answer: Answer) -> None:
        """Refuse a fusion that the members' engine does not know."""
        engine = self.engine_of(answer)
        traits = self._traits[engine]
        if len(answer.members) > 1 and answer.rule not in traits.rules:
            raise PolicyError(
                f"the plan fuses by the rule {answer.rule!r}, which the engine {engine!r} does not "
                f"know; allowed are {', '.join(traits.rules)}"
            )
        if answer.update and not traits.updates_evidence:
            raise PolicyError(
                f"the plan updates evidence as tokens come, which the engine {engine!r} cannot"
            )

    def check_tools(self, answer: Answer) -> None:
        """Raise `RequestError` if the members of `answer` cannot be offered tools."""
        engine = self.engine_of(answer)
        if not self._traits[engine].tools:
            raise RequestError(
                f"tools: {', '.join(answer.members)} cannot call any: the engine {engine!r} knows "
                "no way to read calls",
                "tools",
            )

    def _check_tells(self, model: str, what: str) -> None:
        """Refuse a plan that needs log-probabilities of a model that gives none."""
        engine = self._engine_of[model]
        if not self._traits[engine].logprobs:
            raise PolicyError(
                f"the plan {what} {model!r}, whose engine {engine!r} returns no log-probabilities "
                "(options.logprobs: false)"
            )

    def _check_scorers(self, plan: Plan) -> None:
        if isinstance(plan, Cascade | Best):
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
                for name in {name for stage in judged for name in members(stage)}:
                    self._check_tells(name, "judges answers of")
        for child in children(plan):
            self._check_scorers(child)

    def _build_policies(self, specs: Mapping[str, Mapping[str, Any]]) -> dict[str, Policy]:
        if DEFAULT_POLICY not in specs:
            first = self.pool.models[0].name
            specs = {DEFAULT_POLICY: {"kind": "fixed", "plan": first}, **specs}
        context = BuildContext(
            folder=self.pool.folder,
            models=self.facts,
            build=build_in,
            scorers=self.scorers,
            reserved=frozenset(self.scorers),
        )
        default = self._build(DEFAULT_POLICY, specs[DEFAULT_POLICY], context)
        context = replace(context, default=default)
        policies = {
            name: default if name == DEFAULT_POLICY else self._build(name, spec, context)
            for name, spec in specs.items()
        }
        for name, policy in policies.items():
            # A plan may name a scorer that another policy brings along, so all are built first.
            with _at(f"policies.{name}"):
                for plan in policy.plans():
                    self.check(plan)
        return policies

    def _build(self, name: str, spec: Mapping[str, Any], context: BuildContext) -> Policy:
        context = replace(context, controllers=[])
        with _at(f"policies.{name}"):
            policy = build_in(spec, context)
        for controller in context.controllers:
            self.controllers[name] = controller
        return policy

    def fixed(self, plan: Plan) -> Policy:
        """Return the policy that always takes `plan`, which `check` has passed.

        Weights that wait for a router get the default policy's predictions.
        """
        return always(plan, router=self.policies[DEFAULT_POLICY])

    def _build_targets(self) -> dict[str, Target]:
        targets = {DEFAULT_POLICY: Target(policy=self.policies["auto"], policy_name="auto")}
        for name, policy in self.policies.items():
            targets[_POLICY_PREFIX + name] = Target(policy=policy, policy_name=name)
        for model in self.pool.models:
            plan = Answer(members=(model.name,))
            targets[model.name] = Target(policy=Fixed(plan=plan), policy_name=None)
        return targets

    def _fingerprint(self) -> str:
        seen = [
            version("shoal"),
            [
                (m.spec.model_dump(mode="json"), m.card.tokenizer_sha256 if m.card else None)
                for m in self.pool.models
            ],
        ]
        return "fp_" + hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:10]


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


def _load_tokenizers(pool: Pool) -> dict[str, Tokenizer]:
    """Return every model's tokenizer; models with the same one share it."""
    loaded: dict[object, Tokenizer] = {}
    by_model: dict[str, Tokenizer] = {}
    for model in pool.models:
        remote = model.spec.remote is not None
        key = model.card.tokenizer_sha256 if model.card else (model.tokenizer, remote)
        if key not in loaded:
            try:
                loaded[key] = load_tokenizer(model)
            except PoolError as error:
                where = "remote.tokenizer" if remote else "checkpoint"
                raise PoolError(f"models.{model.name}.{where}: {error}") from None
        by_model[model.name] = loaded[key]
    return by_model
