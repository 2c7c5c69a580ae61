"""How models and policies do on questions that nothing was learned from.

Shape legend: Q test questions, M models.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.pool import Pool
from policies.base import ModelFacts, Policy
from policies.cascade.base import Readings, Scorer
from policies.errors import OutcomesError
from policies.evaluation.metrics import bootstrap
from policies.evaluation.play import Played, play
from policies.fixed import Fixed
from policies.footprint import Rates
from policies.outcomes import Outcome
from policies.plan import Answer
from policies.registry import BuildContext
from policies.routing.router import Router
from router.catalog.catalog import load_catalog
from router.catalog.policies import DEFAULT_POLICY

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Something's mean quality on the test questions with a 95% bootstrap interval, and mean USD.

    `kind` is "model", "policy", "serving" or "reference"; `usd` None where it is not known.
    """

    name: str
    kind: str
    quality_Q: Floats
    usd: float | None

    @property
    def quality(self) -> float:
        """The mean."""
        return float(self.quality_Q.mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95% interval."""
        return bootstrap(lambda rows: float(self.quality_Q[rows].mean()), len(self.quality_Q))


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A question whose chosen model answered worse than another, and how sure the router was."""

    query: str
    chosen: str
    expected: float
    better: str


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Test questions near one of the router's clusters: an `example`, the likest of them, and what
    the learned router does with them. `chosen` is who answers most of them, a `share` of them;
    `expected` what it expects of its choices, `scored` what these scored."""

    example: str
    num_questions: int
    chosen: str
    share: float
    expected: float
    scored: float


@dataclass(frozen=True, kw_only=True)
class Exam:
    """`tests` are outcomes with a score of each of `names`, models of `pool`."""

    pool: Pool
    names: Sequence[str]
    tests: Sequence[Outcome]
    readings: Readings

    @cached_property
    def facts(self) -> Mapping[str, ModelFacts]:
        """What is known of the pool's models."""
        return self.pool.facts()

    @property
    def rates(self) -> dict[str, Rates]:
        """What the models cost."""
        return {name: self.facts[name].rates for name in self.names}

    def measure(self, specs: Mapping[str, Mapping[str, Any]], notes: list[str]) -> list[Measured]:
        """Play every model, policy and reference; `notes` get what cannot be played."""
        context = BuildContext(folder=self.pool.folder, models=self.facts)
        policies: dict[str, tuple[str, Policy]] = {
            name: ("model", Fixed(plan=Answer(members=(name,)))) for name in self.names
        }
        policies |= {name: ("policy", context.build(spec)) for name, spec in specs.items()}
        serving = load_catalog(self.pool).policies
        policies[f"{DEFAULT_POLICY} (serving)"] = ("serving", serving.default)
        scorers: dict[str, Scorer] = {**serving.scorers, **context.scorers}
        found = []
        for name, (kind, policy) in policies.items():
            try:
                found.append(_measured(name, kind, self._played(policy, scorers)))
            except OutcomesError as error:
                notes.append(f"{name} cannot be compared: {error}")
        return [*found, *self._references()]

    def kinds(self, router: Router, spec: Mapping[str, Any]) -> tuple[Kind, ...]:
        """Return what the router's policy, `spec`, does with each kind of test question."""
        context = BuildContext(folder=self.pool.folder, models=self.facts)
        played = self._played(context.build(spec), {})
        predicted = [router.predict(row.query) for row in self.tests]
        found = []
        for cluster in {one.cluster for one in predicted}:
            here = [q for q, one in enumerate(predicted) if one.cluster == cluster]
            example = max(here, key=lambda q: predicted[q].similarity)
            [(chosen, number)] = Counter(played[q].name for q in here).most_common(1)
            expected = [predicted[q].quality_M[router.models.index(played[q].name)] for q in here]
            found.append(
                Kind(
                    example=self.tests[example].query,
                    num_questions=len(here),
                    chosen=chosen,
                    share=number / len(here),
                    expected=float(np.mean(expected)),
                    scored=float(np.mean([played[q].quality for q in here])),
                )
            )
        return tuple(sorted(found, key=lambda one: -one.num_questions)[:12])

    def mistakes(self, router: Router) -> tuple[Mistake, ...]:
        """Return where the router's favourite was worse than another model, the surest first."""
        found = []
        quality_QM = router.qualities([row.query for row in self.tests])
        for row, quality_M in zip(self.tests, quality_QM, strict=True):
            chosen = router.models[int(quality_M.argmax())]
            better = max(row.scores, key=row.scores.__getitem__)
            if row.scores[better] > row.scores[chosen]:
                found.append(
                    Mistake(query=row.query, chosen=chosen, expected=float(quality_M.max()),
                            better=better)
                )  # fmt: skip
        return tuple(sorted(found, key=lambda one: -one.expected)[:12])

    def choices_score(self, router: Router) -> float:
        """Return the mean score of the models that the router expects most of."""
        chosen_Q = router.qualities([row.query for row in self.tests]).argmax(1)
        pairs = zip(self.tests, chosen_Q, strict=True)
        return float(np.mean([row.scores[router.models[m]] for row, m in pairs]))

    def _references(self) -> Iterator[Measured]:
        """Yield a choice by lot, and by those who know the scores; of equals the cheapest."""
        scores_QM = np.array([[row.scores[name] for name in self.names] for row in self.tests])
        singles = [self._played(Fixed(plan=Answer(members=(name,))), {}) for name in self.names]
        usd_QM = np.array([[one.usd or 0.0 for one in played] for played in singles]).T
        chosen_by = {"oracle of each question": np.lexsort((usd_QM, -scores_QM), axis=1)[:, 0]}
        tasks_Q = np.array([row.tags[0] if row.tags else "" for row in self.tests])
        if len(set(tasks_Q)) > 1:
            by_task = {task: scores_QM[tasks_Q == task].mean(0).argmax() for task in set(tasks_Q)}
            chosen_by["oracle of each task"] = np.array([by_task[task] for task in tasks_Q])
        yield Measured(
            name="random", kind="reference", quality_Q=scores_QM.mean(1), usd=float(usd_QM.mean())
        )
        every_Q = np.arange(len(self.tests))
        for name, chosen_Q in chosen_by.items():
            yield Measured(
                name=name,
                kind="reference",
                quality_Q=scores_QM[every_Q, chosen_Q],
                usd=float(usd_QM[every_Q, chosen_Q].mean()),
            )

    def _played(self, policy: Policy, scorers: Mapping[str, Scorer]) -> list[Played]:
        return [
            play(policy, row, rates=self.rates, scorers=scorers, readings=self.readings)
            for row in self.tests
        ]


def _measured(name: str, kind: str, played: Sequence[Played]) -> Measured:
    costs = [one.usd for one in played if one.usd is not None]
    return Measured(
        name=name,
        kind=kind,
        quality_Q=np.array([one.quality for one in played]),
        usd=float(np.mean(costs)) if len(costs) == len(played) else None,
    )
