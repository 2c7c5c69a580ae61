"""A second look before the answer begins: a cheap model reads the prompt, and what it makes of it
decides whether it answers.

Its prefill is the beginning of its answer, so looking costs nothing where it then answers, and one
prefill where another does. What a reading says is learned (`looks`), beside the router.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from pydantic import Field

from policies.base import Decision, ModelFacts, Policy, Query
from policies.cascade.base import Attempt, Reading
from policies.errors import PolicyError
from policies.plan import Answer, Cascade, Name, Plan
from policies.registry import BuildContext, PolicyKind
from policies.routing.policy import Learned, RoutedSettings, Trade
from policies.routing.router import Router, load_router


class Foresight:
    """P(a model will be right) by its router, corrected by its look at the prompt."""

    def __init__(self, router: Router) -> None:
        self._router = router

    def foresee(self, query: str, stage: Plan, reading: Reading | None) -> float:
        """Return it for the model of `stage`; 0 for one that the router does not know."""
        name = stage.members[0] if isinstance(stage, Answer) else ""
        if name not in self._router.models:
            return 0.0
        expected = float(self._router.predict(query).quality_M[self._router.models.index(name)])
        look = self._router.looks.get(name)
        if look is not None and reading is not None:
            expected += look.correction(reading)
        return min(max(expected, 0.0), 1.0)

    def score(self, attempt: Attempt) -> float:
        """Return what was expected of the attempt by its query: its answer is not read."""
        return self.foresee(attempt.query, attempt.plan, None)


class Probing(Learned):
    """Has a cheap model read the prompt where its reading may change who should answer.

    Where the text leaves it open, within the reach of a look, whether a model is worth its price
    more than all others, the cheapest such model reads the prompt. If it is worth more after that,
    it answers; if not, the best of the others does. Everything else is as in `Learned`.
    """

    def __init__(
        self,
        router: Router,
        *,
        models: Mapping[str, ModelFacts],
        trade: Trade | None = None,
        unfamiliar: Plan | None = None,
        scorer: str = "probing",
    ) -> None:
        super().__init__(router, models=models, trade=trade, unfamiliar=unfamiliar)
        self.scorer = Foresight(router)
        self._scorer_name = scorer
        self._readers = tuple(name for name in self._names if name in router.looks)
        if not self._readers or len(self._names) < 2:
            raise PolicyError(
                "probing: the router has learned from no model's readings; see "
                "`shoal train router --readers`, or take the kind learned"
            )

    def decide(self, query: Query) -> Decision:
        """Return the plan for `query`: a look first where that pays."""
        decision = super().decide(query)
        chain = self._chain(query, decision) if decision.familiar else None
        if chain is None or any(map(self._is_for_safety, query.earlier)):
            return decision
        reader, other = (stage.members[0] for stage in chain.stages if isinstance(stage, Answer))
        return replace(
            decision,
            plan=chain,
            reason=f"{reader} reads the prompt: it answers if it is then expected to score "
            f"at least {chain.thresholds[0]:.2f}, else {other} does",
        )

    def plans(self) -> Iterable[Plan]:
        """Return what `Learned` has, and every reader before another model."""
        yield from super().plans()
        for reader in self._readers:
            other = next(name for name in self._names if name != reader)
            yield self._cascade((reader, other), 0.0)

    def _chain(self, query: Query, decision: Decision) -> Cascade | None:
        """Return the look at the prompt that may change the decision, if one may."""
        costs_M = self._chooser.costs_usd(query)
        usd = {name: float(costs_M[m]) for name, m in self._allowed}
        value = self._chooser.trade.answer_value_usd
        price = {name: 0.0 if value is None else usd[name] / value for name in self._names}
        worth = {name: decision.scores[name] - price[name] for name in self._names}

        def rival(name: str) -> str:
            others = [other for other in self._names if other != name]
            best: str = max(others, key=worth.__getitem__)
            return best

        dearest = usd[max(self._names, key=worth.__getitem__)]
        able = [
            name
            for name in self._readers
            if usd[name] <= dearest
            and abs(worth[rival(name)] - worth[name]) <= self._router.looks[name].reach
        ]
        if not able:
            return None
        reader = min(able, key=lambda name: (usd[name], -worth[name]))
        other = rival(reader)
        return self._cascade((reader, other), min(max(worth[other] + price[reader], 0.0), 1.0))

    def _cascade(self, names: tuple[str, str], threshold: float) -> Cascade:
        return Cascade(
            stages=tuple(Answer(members=(name,)) for name in names),
            thresholds=(threshold,),
            scorer=self._scorer_name,
        )


class ProbingSettings(RoutedSettings):
    """The keys of `kind: learned`, and the name under which plans refer to the scorer."""

    scorer: Name = Field("probing", description="The name that plans know its scorer by.")


def _build(settings: ProbingSettings, context: BuildContext) -> Policy:
    policy = Probing(
        load_router(context.folder / settings.path),
        models=context.models,
        trade=Trade(answer_value_usd=settings.answer_value_usd, members=settings.members),
        unfamiliar=settings.unfamiliar,
        scorer=settings.scorer,
    )
    context.bring_scorer(settings.scorer, policy.scorer)
    return policy


KIND = PolicyKind(settings=ProbingSettings, build=_build)
