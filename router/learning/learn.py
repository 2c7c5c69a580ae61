"""From outcomes to a pool's policies, measured on questions that none of them has seen.

auto      the model that a learned router expects most of for its price (ZOOTER)
probing   the same, but where it is open a cheap model reads the question first
cascade   stages from cheap to dear, until an answer is likely right (FrugalGPT)
best-of   the cheap models side by side; the cascade's scorer picks
fused     models that one engine can fuse, token by token, weighted by router and evidence

Each gets a version, so that what serves goes on as it was.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.pool import Pool
from policies.base import ModelFacts, Policy, Query
from policies.cascade.answers import answer_table
from policies.cascade.base import Readings, Scorer
from policies.cascade.learn import learn_cascade
from policies.encoders.base import parse_encoder
from policies.errors import OutcomesError, PolicyError
from policies.evaluation.metrics import bootstrap
from policies.evaluation.play import Played, play
from policies.fixed import Fixed
from policies.footprint import Rates
from policies.outcome_sets import TEST, divide
from policies.outcomes import Outcome
from policies.plan import Answer, Plan
from policies.registry import BuildContext
from policies.routing.fit import MIN_QUERIES, FitSettings, fit_router
from policies.routing.policy import Trade, make_chooser
from policies.routing.router import Router, save_router
from router.catalog.catalog import load_catalog
from router.catalog.policies import DEFAULT_POLICY
from router.learning.fusing import fusible, learn_fusion

Floats = NDArray[np.float64]

MIN_TESTS: Final = 10
_MOST_CANDIDATES: Final = 4
# The questions of one's own are few; 2^13 features of each kind tell them apart.
_NGRAMS: Final = {"bits": 13}
_CURVE_SHARES: Final = (0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class LearnSettings:
    """`budget_share` bounds a policy's mean cost, as a share of always asking the dearest model."""

    budget_share: float = 0.4
    test_share: float = 0.3
    encoder: str = "ngrams"
    seed: int = 0


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
class Lesson:
    """What was learned: `specs` by policy name, and how everything did on the test questions.

    `kinds` say what a question like one of them would get, the most frequent first. `curve` are
    pairs of a number of training questions and the router's mean test quality; `notes` say what
    could not be learned. `best_single` is the model that did best in training.
    """

    specs: Mapping[str, Mapping[str, Any]]
    measured: tuple[Measured, ...]
    mistakes: tuple[Mistake, ...]
    kinds: tuple[Kind, ...]
    curve: tuple[tuple[int, float], ...]
    num_train: int
    best_single: str
    version: int
    unfamiliar: float
    notes: list[str] = field(default_factory=list)

    def row(self, name: str) -> Measured:
        """Return what was measured of `name`."""
        return next(row for row in self.measured if row.name == name)

    @property
    def auto(self) -> str:
        """The router's name in the pool."""
        return f"auto-v{self.version}"


def next_version(pool: Pool) -> int:
    """Return the least version that neither the pool's policies nor its folder has."""
    version = 1
    while (pool.folder / _folder(version)).exists() or f"auto-v{version}" in pool.policies:
        version += 1
    return version


def _folder(version: int) -> Path:
    return Path("learned") / f"v{version}"


def learn(
    outcomes: Sequence[Outcome],
    pool: Pool,
    settings: LearnSettings,
    readings: Readings = MappingProxyType({}),
) -> Lesson:
    """Learn policies from `outcomes`, write their files into the pool's folder, and measure them.

    `readings` are what the pool's models make of the questions before they answer, of those that
    tell (see `asking.read_prompts`); without any there is no policy that looks at them.

    Raises `PolicyError` where there is too little to learn from, and says how much more it takes.
    """
    facts = pool.facts()
    names = [name for name in facts if any(name in outcome.scores for outcome in outcomes)]
    if len(names) < 2:
        raise PolicyError(
            f"the outcomes score {len(names)} of the pool's models ({', '.join(facts)}); there is "
            "nothing to choose between"
        )
    divided = divide(outcomes, test_share=settings.test_share, seed=settings.seed)
    complete = [row for row in divided if all(name in row.scores for name in names)]
    train = [row for row in divided if row.split != TEST]
    tests = [row for row in complete if row.split == TEST]
    if len(train) < MIN_QUERIES or len(tests) < MIN_TESTS:
        wanted = max(MIN_QUERIES / (1 - settings.test_share), MIN_TESTS / settings.test_share)
        raise PolicyError(
            f"{len(complete)} questions that all of {', '.join(names)} answered are too few: "
            f"{len(train)} to learn from and {len(tests)} to measure on. Give about "
            f"{max(1, round(1.2 * wanted) - len(complete))} more"
        )
    version = next_version(pool)
    folder = _folder(version)
    (pool.folder / folder).mkdir(parents=True)
    school = _School(
        pool=pool, facts=facts, names=names, train=train, settings=settings, readings=readings
    )
    router, auto = school.route(folder)
    specs: dict[str, dict[str, Any]] = {"auto": auto}
    notes: list[str] = []
    if router.looks:
        specs["probing"] = {**auto, "kind": "probing", "scorer": f"probing-v{version}"}
    elif readings:
        notes.append(
            f"no probing: what {', '.join(readings)} make of a question says no more than its text"
        )
    try:
        specs |= school.cascade(folder, f"cascade-v{version}")
    except PolicyError as error:
        notes.append(f"no cascade and no best-of: {error}")
    members = fusible(pool, names)
    if members:
        try:
            specs["fused"] = learn_fusion(pool, members, train, school.fit, router=auto)
        except PolicyError as error:
            notes.append(f"no fused: {error}")
    versioned = {f"{name}-v{version}": spec for name, spec in specs.items()}
    measured = school.measure(tests, versioned, notes)
    return Lesson(
        specs=versioned,
        measured=tuple(measured),
        mistakes=_mistakes(router, tests),
        kinds=school.kinds(router, auto, tests),
        curve=school.curve(tests),
        num_train=len(train),
        best_single=school.best_single,
        version=version,
        unfamiliar=float(np.mean([not router.predict(row.query).familiar for row in tests])),
        notes=notes,
    )


@dataclass(frozen=True, kw_only=True)
class _School:
    """What is learned from: the training questions of a pool's models."""

    pool: Pool
    facts: Mapping[str, ModelFacts]
    names: Sequence[str]
    train: Sequence[Outcome]
    settings: LearnSettings
    readings: Readings

    @property
    def rates(self) -> dict[str, Rates]:
        return {name: self.facts[name].rates for name in self.names}

    @property
    def best_single(self) -> str:
        return max(self.names, key=lambda name: _mean(r.scores.get(name) for r in self.train))

    def usd(self, name: str) -> float:
        """The mean cost of asking `name` every training question that it has answered."""
        policy = Fixed(plan=Answer(members=(name,)))
        asked = [row for row in self.train if name in row.scores]
        played = (play(policy, row, rates=self.rates, scorers={}) for row in asked)
        return _mean(one.usd for one in played)

    @property
    def budget_usd(self) -> float:
        """What a question may cost on average; the cheapest model can always be paid."""
        costs = [self.usd(name) for name in self.names]
        return max(self.settings.budget_share * max(costs), min(costs))

    def fit(self, rows: Sequence[Outcome], readings: Readings | None = None) -> Router:
        """Return a router between the models, learned from `rows`."""
        text = self.settings.encoder
        return fit_router(
            rows,
            encoder=parse_encoder(text, _NGRAMS if text == "ngrams" else {}),
            models=self.names,
            settings=FitSettings(seed=self.settings.seed),
            readings=readings,
        )

    def route(self, folder: Path) -> tuple[Router, dict[str, Any]]:
        """Write the router and return it with its policy, whose price fits the budget."""
        router = self.fit(self.train, self.readings)
        file = folder / "router.npz"
        save_router(router, self.pool.folder / file)
        spec: dict[str, Any] = {"kind": "learned", "path": str(file)}
        value = self._answer_value(router)
        return router, spec if value is None else {**spec, "answer_value_usd": value}

    def _answer_value(self, router: Router) -> float | None:
        """Return the highest value of an answer under which the mean expected cost is in budget.

        None where quality alone is.
        """
        quality_QM = router.qualities([row.query for row in self.train])
        chooser = make_chooser(Trade(), router.models, router.output_tokens_M, self.facts)
        queries = [Query(text=r.query, prompt_tokens=r.prompt_tokens or 0) for r in self.train]
        usd_QM = np.array([chooser.costs_usd(query) for query in queries])
        for value in (None, *np.logspace(3, -10, 131)):
            utility_QM = quality_QM if value is None else quality_QM - usd_QM / value
            chosen_Q1 = utility_QM.argmax(1)[:, None]
            if np.take_along_axis(usd_QM, chosen_Q1, 1).mean() <= self.budget_usd * (1 + 1e-9):
                return None if value is None else float(f"{value:.3g}")
        return 1e-10

    def cascade(self, folder: Path, scorer: str) -> dict[str, dict[str, Any]]:
        """Write the cascade, and return its policy and that of best-of."""
        plans: dict[str, Plan] = {name: Answer(members=(name,)) for name in self.names}
        table, usd_QS = answer_table(self.train, plans, self.rates)
        costs = dict(zip(self.names, usd_QS.mean(0).tolist(), strict=True))
        dearest = max(costs, key=costs.__getitem__)
        learned = learn_cascade(
            table,
            usd_QS,
            budget=max(self.budget_usd, min(costs.values())),
            routed=[name for name in self.names if name != dearest],
            seed=self.settings.seed,
        )
        file = folder / "cascade.npz"
        learned.save(self.pool.folder / file)
        specs: dict[str, dict[str, Any]] = {
            "cascade": {"kind": "frugal", "path": str(file), "scorer": scorer}
        }
        cheap: list[str] = []
        spent = 0.0
        for name in sorted(self.names, key=costs.__getitem__):
            spent += costs[name]
            if spent <= self.budget_usd * (1 + 1e-9) and len(cheap) < _MOST_CANDIDATES:
                cheap.append(name)
        if len(cheap) > 1:
            best = {"candidates": cheap, "select": "scorer", "scorer": scorer}
            specs["best-of"] = {"kind": "fixed", "plan": {"best": best}}
        return specs

    def measure(
        self, tests: Sequence[Outcome], specs: Mapping[str, Mapping[str, Any]], notes: list[str]
    ) -> list[Measured]:
        """Play every model, policy and reference on `tests`; `notes` say what cannot be played."""
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
                played = [
                    play(policy, r, rates=self.rates, scorers=scorers, readings=self.readings)
                    for r in tests
                ]
            except OutcomesError as error:
                notes.append(f"{name} cannot be compared: {error}")
                continue
            found.append(_measured(name, kind, played))
        return [*found, *self._references(tests)]

    def kinds(
        self, router: Router, spec: Mapping[str, Any], tests: Sequence[Outcome], most: int = 12
    ) -> tuple[Kind, ...]:
        """Return what the router's policy, `spec`, does with each kind of test question."""
        policy = BuildContext(folder=self.pool.folder, models=self.facts).build(spec)
        played = [play(policy, row, rates=self.rates, scorers={}) for row in tests]
        predicted = [router.predict(row.query) for row in tests]
        found = []
        for cluster in {one.cluster for one in predicted}:
            here = [q for q, one in enumerate(predicted) if one.cluster == cluster]
            example = max(here, key=lambda q: predicted[q].similarity)
            [(chosen, number)] = Counter(played[q].name for q in here).most_common(1)
            expected = [predicted[q].quality_M[router.models.index(played[q].name)] for q in here]
            found.append(
                Kind(
                    example=tests[example].query,
                    num_questions=len(here),
                    chosen=chosen,
                    share=number / len(here),
                    expected=float(np.mean(expected)),
                    scored=float(np.mean([played[q].quality for q in here])),
                )
            )
        return tuple(sorted(found, key=lambda one: -one.num_questions)[:most])

    def _references(self, tests: Sequence[Outcome]) -> list[Measured]:
        scores_QM = np.array([[row.scores[name] for name in self.names] for row in tests])
        singles = [Fixed(plan=Answer(members=(name,))) for name in self.names]
        usd_QM = np.array(
            [[play(p, r, rates=self.rates, scorers={}).usd or 0.0 for p in singles] for r in tests]
        )
        best_Q1 = np.lexsort((usd_QM, -scores_QM), axis=1)[:, :1]
        oracles = {"oracle of each question": best_Q1}
        tasks_Q = np.array([row.tags[0] if row.tags else "" for row in tests])
        if len(set(tasks_Q)) > 1:
            by_task = {task: scores_QM[tasks_Q == task].mean(0).argmax() for task in set(tasks_Q)}
            oracles["oracle of each task"] = np.array([[by_task[task]] for task in tasks_Q])
        return [
            Measured(name="random", kind="reference", quality_Q=scores_QM.mean(1),
                     usd=float(usd_QM.mean())),
            *(
                Measured(
                    name=name,
                    kind="reference",
                    quality_Q=np.take_along_axis(scores_QM, chosen_Q1, 1)[:, 0],
                    usd=float(np.take_along_axis(usd_QM, chosen_Q1, 1).mean()),
                )
                for name, chosen_Q1 in oracles.items()
            ),
        ]  # fmt: skip

    def curve(self, tests: Sequence[Outcome]) -> tuple[tuple[int, float], ...]:
        """Return the router's mean test quality after parts of the training questions."""
        order = np.random.default_rng(self.settings.seed).permutation(len(self.train))
        points = []
        for share in _CURVE_SHARES:
            size = round(share * len(self.train))
            if size < MIN_QUERIES:
                continue
            try:
                router = self.fit([self.train[at] for at in order[:size]])
            except PolicyError:  # none of them scores some model
                continue
            chosen_Q = router.qualities([row.query for row in tests]).argmax(1)
            scores = [r.scores[router.models[m]] for r, m in zip(tests, chosen_Q, strict=True)]
            points.append((size, float(np.mean(scores))))
        return tuple(points)


def _measured(name: str, kind: str, played: Sequence[Played]) -> Measured:
    costs = [one.usd for one in played if one.usd is not None]
    return Measured(
        name=name,
        kind=kind,
        quality_Q=np.array([one.quality for one in played]),
        usd=float(np.mean(costs)) if len(costs) == len(played) else None,
    )


def _mistakes(router: Router, tests: Sequence[Outcome], most: int = 12) -> tuple[Mistake, ...]:
    """Return where the router's favourite was worse than another model, the surest first."""
    found = []
    for row, quality_M in zip(tests, router.qualities([r.query for r in tests]), strict=True):
        chosen = router.models[int(quality_M.argmax())]
        better = max(row.scores, key=row.scores.__getitem__)
        if row.scores[better] > row.scores[chosen]:
            found.append(
                Mistake(query=row.query, chosen=chosen, expected=float(quality_M.max()),
                        better=better)
            )  # fmt: skip
    return tuple(sorted(found, key=lambda one: -one.expected)[:most])


def _mean(values: Any) -> float:  # noqa: ANN401 - an iterable of numbers or None
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0
