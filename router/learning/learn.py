"""From outcomes to a pool's policies, measured on questions that none of them has seen.

auto      the model that a learned router expects most of for its price (ZOOTER)
probing   the same, but where it is open a cheap model reads the question first
cascade   stages from cheap to dear, until an answer is likely right (FrugalGPT)
best-of   the cheap models side by side; the cascade's scorer picks
fused     models that one engine can fuse, token by token, weighted by router and evidence

Each gets a version, so that what serves goes on as it was.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np

from models.pool import Pool
from policies.base import ModelFacts, Query
from policies.cascade.answers import answer_table
from policies.cascade.base import Readings
from policies.cascade.learn import learn_cascade
from policies.encoders.base import parse_encoder
from policies.errors import PolicyError
from policies.evaluation.play import play
from policies.fixed import Fixed
from policies.footprint import Rates
from policies.outcome_sets import TEST, divide
from policies.outcomes import Outcome
from policies.plan import Answer, Plan
from policies.routing.fit import MIN_QUERIES, FitSettings, fit_router
from policies.routing.policy import Trade, make_chooser
from policies.routing.router import Router, save_router
from router.learning.exam import Exam, Kind, Measured, Mistake
from router.learning.fusing import fusible, learn_fusion

MIN_TESTS: Final = 10
_MOST_CANDIDATES: Final = 4
# The questions of one's own are few; 2^13 features of each kind tell them apart.
_NGRAMS: Final = {"bits": 13}
_CURVE_SHARES: Final = (0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class LearnSettings:
    """`budget_share` bounds a policy's mean cost, as a share of always asking the dearest model.

    `models` are those of the pool to choose between; empty: all that the outcomes score.
    """

    budget_share: float = 0.4
    test_share: float = 0.3
    encoder: str = "ngrams"
    seed: int = 0
    models: tuple[str, ...] = ()


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


def claim_version(pool: Pool) -> int:
    """Make the folder of the least version that neither the pool's policies nor its folder has.

    Whoever learns for the pool at the same time gets another.
    """
    for version in itertools.count(1):
        if f"auto-v{version}" in pool.policies:
            continue
        with contextlib.suppress(FileExistsError):
            (pool.folder / _folder(version)).mkdir(parents=True)
            return version
    raise AssertionError("versions do not end")


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
    for name in settings.models:
        if name not in facts:
            raise PolicyError(f"--models: {name!r} is unknown; the pool has {', '.join(facts)}")
    scored = Counter(name for outcome in outcomes for name in outcome.scores)
    every = [name for name in facts if name in scored and name in (settings.models or facts)]
    if len(every) < 2:
        raise PolicyError(
            f"the outcomes score {', '.join(scored)}, and {len(every)} of them are among "
            f"{', '.join(settings.models or facts)}; there is nothing to choose between"
        )
    divided = divide(outcomes, test_share=settings.test_share, seed=settings.seed)
    names = _comparable(divided, every)
    notes = [
        f"left out {name}: {scored[name]} questions have its score"
        for name in every
        if name not in names
    ]
    complete = _complete(divided, names)
    train = [r for r in divided if r.split != TEST and any(name in r.scores for name in names)]
    tests = [row for row in complete if row.split == TEST]
    if len(train) < MIN_QUERIES or len(tests) < MIN_TESTS:
        wanted = max(MIN_QUERIES / (1 - settings.test_share), MIN_TESTS / settings.test_share)
        partly = len(divided) - len(complete)
        raise PolicyError(
            f"{len(complete)} questions that all of {', '.join(names)} answered are too few: "
            f"{len(train)} to learn from and {len(tests)} to measure on. Give about "
            f"{max(1, round(1.2 * wanted) - len(complete))} more"
            + (f"; of {partly} others only some models' answers are known" if partly else "")
        )
    readings = {name: told for name, told in readings.items() if name in names}
    school = _School(
        pool=pool, facts=facts, names=names, train=train, settings=settings, readings=readings
    )
    version = claim_version(pool)
    try:
        return school.lesson(version, tests, notes)
    except BaseException:  # interrupted, too: nobody can use half of it
        shutil.rmtree(pool.folder / _folder(version), ignore_errors=True)
        raise


def _complete(outcomes: Sequence[Outcome], names: Sequence[str]) -> list[Outcome]:
    return [row for row in outcomes if all(name in row.scores for name in names)]


def _comparable(divided: Sequence[Outcome], names: Sequence[str]) -> list[str]:
    """Return those of `names` that enough test questions score all.

    Models that few questions were put to are left out where they would leave too few that all
    have answered; all names where that does not help.
    """
    tests = [row for row in divided if row.split == TEST]
    kept = list(names)
    while len(_complete(tests, kept)) < MIN_TESTS:
        if len(kept) == 2:
            return list(names)
        kept.remove(min(kept, key=lambda name: sum(name in row.scores for row in tests)))
    return kept


@dataclass(frozen=True, kw_only=True)
class _School:
    """What is learned from: the training questions of a pool's models."""

    pool: Pool
    facts: Mapping[str, ModelFacts]
    names: Sequence[str]
    train: Sequence[Outcome]
    settings: LearnSettings
    readings: Readings

    def lesson(self, version: int, tests: Sequence[Outcome], notes: list[str]) -> Lesson:
        """Learn everything, as `version`, and measure it on `tests`."""
        folder = _folder(version)
        router, auto = self.route(folder)
        specs: dict[str, dict[str, Any]] = {"auto": auto}
        if router.looks:
            specs["probing"] = {**auto, "kind": "probing", "scorer": f"probing-v{version}"}
        elif self.readings:
            read = ", ".join(self.readings)
            notes.append(f"no probing: what {read} make of a question says no more than its text")
        try:
            specs |= self.cascade(folder, f"cascade-v{version}")
        except PolicyError as error:
            notes.append(f"no cascade and no best-of: {error}")
        members = fusible(self.pool, self.names)
        if members:
            try:
                specs["fused"] = learn_fusion(self.pool, members, self.train, self.fit, router=auto)
            except PolicyError as error:
                notes.append(f"no fused: {error}")
        versioned = {f"{name}-v{version}": spec for name, spec in specs.items()}
        exam = Exam(pool=self.pool, names=self.names, tests=tests, readings=self.readings)
        measured = tuple(exam.measure(versioned, notes))
        quality = {row.name: row.quality for row in measured}
        looking, blind = f"probing-v{version}", f"auto-v{version}"
        if looking in quality and quality[looking] < quality[blind]:
            del versioned[looking]
            notes.append(
                f"no {looking}: a look at the prompt made the test questions' answers worse by "
                f"{100 * (quality[blind] - quality[looking]):.2g} points"
            )
        return Lesson(
            specs=versioned,
            measured=measured,
            mistakes=exam.mistakes(router),
            kinds=exam.kinds(router, auto),
            curve=self.curve(exam),
            num_train=len(self.train),
            best_single=self.best_single,
            version=version,
            unfamiliar=float(np.mean([not router.predict(row.query).familiar for row in tests])),
            notes=notes,
        )

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
        """Write the router into `folder`, and return it; with its policy, whose price fits the
        budget."""
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

    def curve(self, exam: Exam) -> tuple[tuple[int, float], ...]:
        """Return the mean test score of a router's choices after parts of the questions."""
        order = np.random.default_rng(self.settings.seed).permutation(len(self.train))
        points = []
        for size in (round(share * len(self.train)) for share in _CURVE_SHARES):
            if size < MIN_QUERIES:
                continue
            try:
                router = self.fit([self.train[at] for at in order[:size]])
            except PolicyError:  # none of them scores some model
                continue
            points.append((size, exam.choices_score(router)))
        return tuple(points)


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0
