"""Language models as graders: one that judges all, or each by how likely it finds what is right.

`judge` compares every pair of answers by a rubric, in both orders.

Judges favour what stands first (Zheng et al. 2023, "Judging LLM-as-a-Judge"), so a pair is won only
where both orders agree and is a tie otherwise. A model's score is the mean of its pairs: 1 won,
0.5 tied, 0 lost. A single answer is graded from 1 to 10 instead.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from itertools import combinations, permutations
from typing import Final

from policies.cascade.base import normalise
from policies.errors import PolicyError
from policies.grading.base import (
    Ask,
    Graded,
    GraderKind,
    GradingContext,
    Likelihood,
    Question,
    Ungradable,
)

_RUBRIC: Final = (
    "Judge by correctness first, then by whether it answers what was asked, then by brevity."
)
# What one question's prompts have in common comes first: an engine that keeps it reads it once.
_PAIR: Final = """Which of two answers, A and B, is better? {rubric}
Reply with one word: A, B or tie.

[Question]
{query}
{reference}
[A]
{first}

[B]
{second}

Better:"""
_SINGLE: Final = """{rubric}

[Question]
{query}
{reference}
[Answer]
{first}

How good is the answer, from 1 (useless) to 10 (perfect)? Reply with the number."""
_WORDS: Final = ("A", "B", "tie")
_SHARES: Final = {"a": 1.0, "b": 0.0, "tie": 0.5}
_NUMBERS: Final = tuple(map(str, range(1, 11)))
_VERDICT = re.compile(r"\b(A|B|tie)\b", re.IGNORECASE)
_GRADE = re.compile(r"\b(10|[1-9])\b")


def single_prompt(question: Question, answer: str, rubric: str | None = None) -> str:
    """Return what a judge is asked of one answer alone."""
    return _SINGLE.format(
        rubric=rubric or _RUBRIC, query=question.query, reference=_reference(question), first=answer
    )


def read_grade(said: str) -> float | None:
    """Return the grade in [0, 1] that a judge gave of one answer; None where it gave none."""
    grade = _GRADE.search(said)
    return None if grade is None else (int(grade[1]) - 1) / 9


class Judge:
    """Asks `model` through `ask`."""

    def __init__(self, model: str, ask: Ask, basis: str = "") -> None:
        self.basis = basis
        self._model = model
        self._ask = ask

    async def grade(self, question: Question, answers: Mapping[str, str]) -> Graded:
        """Return each model's share of pairs won; raises `Ungradable` for a judge without words."""
        if len(answers) == 1:
            [(name, text)] = answers.items()
            said = await self._ask(self._model, single_prompt(question, text), _NUMBERS)
            grade = read_grade(said)
            if grade is None:
                raise Ungradable(f"the judge {self._model} gave no grade but {said[:60]!r}")
            return Graded(scores={name: grade})
        told: dict[tuple[str, str], float | None] = {}
        # By what stands first: a prompt begins as the one before it, which engines still have.
        for one, other in permutations(answers, 2):
            reverse = told.get((other, one), 1.0)
            if normalise(answers[one]) == normalise(answers[other]):
                told[one, other] = 0.5
            elif reverse in (None, 0.5):  # whatever this order brings, nobody wins
                told[one, other] = reverse
            else:
                told[one, other] = await self._say(question, answers[one], answers[other])
        won: dict[str, list[float]] = defaultdict(list)
        for one, other in combinations(answers, 2):
            first, second = told[one, other], told[other, one]
            if first is not None and second is not None:
                share = first if first == 1 - second else 0.5
                won[one].append(share)
                won[other].append(1 - share)
        if not won:
            raise Ungradable(f"the judge {self._model} named no winner of any pair")
        return Graded(scores={name: sum(shares) / len(shares) for name, shares in won.items()})

    async def _say(self, question: Question, first: str, second: str) -> float | None:
        """Return 1 where the judge prefers `first`, 0 `second`, 0.5 neither; None: it says none."""
        prompt = _PAIR.format(
            rubric=_RUBRIC,
            query=question.query,
            reference=_reference(question),
            first=first,
            second=second,
        )
        verdict = _VERDICT.search(await self._ask(self._model, prompt, _WORDS))
        return None if verdict is None else _SHARES[verdict[1].lower()]


def _reference(question: Question) -> str:
    if not question.references:
        return ""
    return f"\n[Reference answer]\n{question.references[0]}\n"


class Loss:
    """e^(mean log-probability per byte) of the first reference under each model; raw is the mean.

    For plain text, where no answer is right: it grades the models, not what they answered.
    """

    def __init__(self, likelihood: Likelihood, basis: str = "") -> None:
        self._likelihood = likelihood
        self.basis = basis

    async def grade(self, question: Question, answers: Mapping[str, str]) -> Graded:
        """Return each model's score; raises `Ungradable` without a reference or its weights."""
        right = question.right()[0]
        num_bytes = len(right.encode("utf-8", "replace"))
        if not num_bytes:
            raise Ungradable("the reference is empty")
        raw = {
            name: await self._likelihood(name, question.query, right) / num_bytes
            for name in answers
        }
        return Graded(
            scores={name: math.exp(min(mean, 0.0)) for name, mean in raw.items()}, raw=raw
        )


def _build_loss(argument: str, context: GradingContext) -> Loss:
    if argument:
        raise PolicyError(f"grade: loss takes no argument, got {argument!r}")
    if context.likelihood is None:
        raise PolicyError("grade: loss reads the models' weights, and needs a --pool")
    for name in context.models:
        try:
            context.likelihood.check(name)
        except Ungradable as error:
            raise PolicyError(f"grade: {error}") from None
    return Loss(context.likelihood, str([context.place(name) for name in context.models]))


def _build(argument: str, context: GradingContext) -> Judge:
    if not argument:
        raise PolicyError("grade: judge needs a model of the pool or server, as in judge:base")
    if context.ask is None:
        raise PolicyError(f"grade: judge:{argument}: there is no pool or server to ask")
    if context.askable is not None and argument not in context.askable:
        known = ", ".join(context.askable)
        raise PolicyError(f"grade: judge:{argument}: {argument!r} is unknown; there are {known}")
    return Judge(argument, context.ask, str(context.place(argument)))


JUDGE = GraderKind(_build)
LOSS = GraderKind(_build_loss)
