"""Graders by name, weighed together: `exact`, `0.5*judge:base`, and those of other distributions.

A grader sees all models' answers to a question at once, as some compare them with each other.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from policies.errors import PolicyError
from policies.kinds import PluginError, Plugins

Ask = Callable[[str, str, Sequence[str]], Awaitable[str]]
"""From a model's name, a prompt and the words to choose from to its answer, which is one of these
where the model can be held to it; raises `Ungradable` where there is none."""


class Ungradable(Exception):
    """Says why a grader has no score for a question: it lacks a reference, a judge was silent."""


class Likelihood(Protocol):
    """How likely models find texts."""

    async def __call__(self, model: str, query: str, text: str, /) -> float:
        """Return log P(text | query) under `model`, in nats; raises `Ungradable`."""
        ...

    def check(self, model: str, /) -> None:
        """Raise `Ungradable` where nothing can be said of `model`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Question:
    """What was asked, and what is known of the right answer.

    `references` are right answers, any of which will do; `choices` the texts to choose from;
    `tests` a program that fails on wrong code; `schema` a JSON schema.
    """

    query: str
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    tests: str | None = None
    schema: Mapping[str, Any] | None = None

    def right(self) -> tuple[str, ...]:
        """Return the references; raises `Ungradable` where there are none."""
        if not self.references:
            raise Ungradable("the question has no reference")
        return self.references


@dataclass(frozen=True, kw_only=True)
class Graded:
    """Scores in [0, 1] by model, and `raw` ones on the grader's own scale, where it has one."""

    scores: Mapping[str, float]
    raw: Mapping[str, float] | None = None


class Grader(Protocol):
    """Scores all models' answers to one question; safe to call for many questions at once.

    One that goes by more than its name says (a model, a program) may have a text `basis` that is
    another where that is: what was said before counts for nothing then.
    """

    async def grade(self, question: Question, answers: Mapping[str, str]) -> Graded:
        """Return the scores of `answers`, by model; raises `Ungradable` to give none."""
        ...


@dataclass(frozen=True)
class GradingContext:
    """What graders may use: `ask` one of the models `askable` (None: nobody knows which there are),
    `locate` the folder that a source names, whether answers may be run as programs, and a
    `likelihood` where weights are at hand. `models` are those whose answers are graded; `place`
    tells a model from another of its name."""

    ask: Ask | None = None
    locate: Callable[[str], Path] = Path
    allow_code: bool = False
    likelihood: Likelihood | None = None
    askable: Collection[str] | None = None
    models: Sequence[str] = ()
    place: Callable[[str], object] = str


@dataclass(frozen=True)
class GraderKind:
    """What `NAME` or `NAME:ARGUMENT` stands for; another distribution's is in `shoal.graders`.

    `build` gets the argument (empty without one) and raises `PolicyError` for a bad one.
    """

    build: Callable[[str, GradingContext], Grader]


KINDS: Plugins[GraderKind] = Plugins(
    "shoal.graders",
    GraderKind,
    {
        "choice": "policies.grading.texts:CHOICE",
        "code": "policies.grading.programs:CODE",
        "command": "policies.grading.programs:COMMAND",
        "contains": "policies.grading.texts:CONTAINS",
        "exact": "policies.grading.texts:EXACT",
        "json": "policies.grading.texts:JSON",
        "judge": "policies.grading.judge:JUDGE",
        "loss": "policies.grading.judge:LOSS",
        "numeric": "policies.grading.numbers:NUMERIC",
        "regex": "policies.grading.texts:REGEX",
        "reward": "policies.grading.networks:REWARD",
        "similarity": "policies.grading.networks:SIMILARITY",
    },
)

_SPEC = re.compile(r"(?:(?P<weight>[0-9.]+)\*)?(?P<kind>[\w-]+)(?::(?P<argument>.*))?", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """One question graded by all graders.

    `scores` are weighted means by model; `grades` what each grader said (raw, where it has a scale
    of its own); `problems` why a grader gave none.
    """

    scores: Mapping[str, float]
    grades: Mapping[str, Mapping[str, float]]
    problems: Mapping[str, str]


class Panel:
    """Several graders with weights; a question's score is the weighted mean of those who grade it.

    A model that one of them left out has no share of that grader in its mean.
    """

    def __init__(self, specs: Sequence[str], context: GradingContext) -> None:
        """`specs` are [WEIGHT*]NAME[:ARGUMENT] each. Raises `PolicyError`."""
        self._graders = {spec: _build(spec, context) for spec in specs}
        if not self._graders:
            raise PolicyError(f"no grader is named; allowed are {', '.join(KINDS.names())}")
        for name, times in Counter(map(_unweighted, specs)).items():
            if times > 1:
                raise PolicyError(f"grade: {name} is named {times} times; give it a weight instead")

    @property
    def bases(self) -> dict[str, str]:
        """What the graders go by beside their names, by these."""
        graders = {_unweighted(spec): grader for spec, (_, grader) in self._graders.items()}
        return {name: getattr(grader, "basis", "") for name, grader in graders.items()}

    async def grade(
        self,
        question: Question,
        answers: Mapping[str, str],
        known: MutableMapping[str, Graded] | None = None,
    ) -> Sheet:
        """Ask every grader about `answers`, by model.

        `known` is what graders have said of them before, by name, and gets what they say now. What
        goes wrong in one is a problem of this question, and never ends a long run.
        """
        known = {} if known is None else known
        found: dict[str, tuple[float, Graded]] = {}
        problems: dict[str, str] = {}
        for spec, (weight, grader) in self._graders.items():
            name = _unweighted(spec)
            try:
                if name not in known:
                    known[name] = await grader.grade(question, answers)
                found[name] = weight, known[name]
            except Ungradable as error:
                problems[spec] = str(error)
            except Exception as error:  # a grader's own fault, perhaps another distribution's
                problems[spec] = f"{type(error).__name__}: {error}"
        scores = {}
        for name in answers:
            given = [(w, graded.scores[name]) for w, graded in found.values()
                     if name in graded.scores]  # fmt: skip
            if given:
                scores[name] = sum(w * score for w, score in given) / sum(w for w, _ in given)
        grades = {spec: dict(graded.raw or graded.scores) for spec, (_, graded) in found.items()}
        return Sheet(scores=scores, grades=grades, problems=problems)


def _build(spec: str, context: GradingContext) -> tuple[float, Grader]:
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise PolicyError(f"grade: {spec!r} is not [WEIGHT*]NAME[:ARGUMENT], as in 0.5*judge:base")
    try:
        weight = float(match["weight"] or 1)
        kind = KINDS.load(match["kind"])
    except ValueError as error:
        told = error if isinstance(error, PluginError) else f"{match['weight']!r} is not a number"
        raise PolicyError(f"grade: {told}") from None
    if weight <= 0:
        raise PolicyError(f"grade: {spec!r}: a weight must be > 0")
    return weight, kind.build(match["argument"] or "", context)


def _unweighted(spec: str) -> str:
    match = _SPEC.fullmatch(spec)
    assert match is not None, "the spec was read before"
    return match["kind"] + (f":{match['argument']}" if match["argument"] else "")
