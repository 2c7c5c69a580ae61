"""Graders that compare each answer's text with the question's references."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from jsonschema import Draft202012Validator

from policies.cascade.base import normalise
from policies.errors import PolicyError
from policies.grading.base import Graded, GraderKind, GradingContext, Question, Ungradable

Compare = Callable[[Question, str], float]


@dataclass(frozen=True)
class Each:
    """Grades every answer by itself: `compare` returns a score in [0, 1] or raises `Ungradable`."""

    compare: Compare

    async def grade(self, question: Question, answers: Mapping[str, str]) -> Graded:
        """Return each answer's score."""
        return Graded(scores={name: self.compare(question, text) for name, text in answers.items()})


def _kind(make: Callable[[str], Compare]) -> GraderKind:
    def build(argument: str, _: GradingContext) -> Each:
        return Each(make(argument))

    return GraderKind(build)


def _plain(name: str, compare: Compare) -> GraderKind:
    def make(argument: str) -> Compare:
        if argument:
            raise PolicyError(f"grade: {name} takes no argument, got {argument!r}")
        return compare

    return _kind(make)


def exact(question: Question, answer: str) -> float:
    """1 where the answer equals a reference but for case, spacing and closing punctuation."""
    return float(normalise(answer) in map(normalise, question.right()))


def contains(question: Question, answer: str) -> float:
    """1 where a reference stands in the answer as whole words, case and spacing aside."""
    said = normalise(answer)
    return float(
        any(
            re.search(rf"(?<!\w){re.escape(normalise(right))}(?!\w)", said)
            for right in question.right()
        )
    )


def regex(argument: str) -> Compare:
    """1 where the argument, or without one a reference, is found in the answer as a pattern."""
    fixed = _compiled(argument, PolicyError) if argument else None

    def compare(question: Question, answer: str) -> float:
        patterns = [fixed] if fixed else [_compiled(p, Ungradable) for p in question.right()]
        return float(any(pattern.search(answer) for pattern in patterns))

    return compare


def _compiled(pattern: str, error: type[Exception]) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as problem:
        raise error(f"grade: regex {pattern!r} is not a pattern: {problem}") from None


# What one of each is in the unit that it is compared in.
_UNITS: Final[dict[str, tuple[str, float]]] = {
    **{unit: ("m", size) for unit, size in
       {"mm": 1e-3, "cm": 1e-2, "m": 1, "km": 1e3, "in": 0.0254, "ft": 0.3048, "mi": 1609.344}
       .items()},
    **{unit: ("g", size) for unit, size in
       {"mg": 1e-3, "g": 1, "kg": 1e3, "t": 1e6, "oz": 28.349523125, "lb": 453.59237}.items()},
    **{unit: ("s", size) for unit, size in
       {"ms": 1e-3, "s": 1, "min": 60, "h": 3600, "d": 86400}.items()},
    **{unit: ("l", size) for unit, size in {"ml": 1e-3, "cl": 1e-2, "l": 1}.items()},
    "%": ("", 0.01),
}  # fmt: skip
_NUMBER = re.compile(r"[-+−]?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?(?:\s?(%|[a-z]+))?", re.I)


def numeric(argument: str) -> Compare:
    """1 where the answer's last number is a reference's, within a relative tolerance.

    The argument is the tolerance (default 1e-6). Units of length, mass, time and volume, and
    percentages, are converted where both sides name one; a side without a unit means the other's.
    """
    try:
        tolerance = float(argument or 1e-6)
    except ValueError:
        raise PolicyError(f"grade: numeric:{argument}: the tolerance is not a number") from None

    def compare(question: Question, answer: str) -> float:
        found = _last_number(answer)
        wanted = [_last_number(right) for right in question.right()]
        if None in wanted:
            raise Ungradable(f"no number in the reference {question.references!r}")
        return float(any(found and right and _same(found, right, tolerance) for right in wanted))

    return compare


def _last_number(text: str) -> tuple[float, str] | None:
    """Return the last number of `text` and its unit, empty where it has none that is known."""
    last = None
    for match in _NUMBER.finditer(text):
        unit = (match[1] or "").lower()
        digits = match[0][: len(match[0]) - len(match[1] or "")].strip()
        value = float(digits.replace(",", "").replace("−", "-"))
        last = value, unit if unit in _UNITS else ""
    return last


def _same(one: tuple[float, str], other: tuple[float, str], tolerance: float) -> bool:
    (a, unit_a), (b, unit_b) = one, other
    if unit_a and unit_b:
        (kind_a, size_a), (kind_b, size_b) = _UNITS[unit_a], _UNITS[unit_b]
        return kind_a == kind_b and math.isclose(a * size_a, b * size_b, rel_tol=tolerance)
    return math.isclose(a, b, rel_tol=tolerance)


_LETTER = re.compile(r"(?:answer(?:\s+is)?|option|choice)?\s*:?\s*\(?([A-Z])\)?(?:[.:)\s]|$)")


def choice(question: Question, answer: str) -> float:
    """1 where the answer names the right one of the question's choices, by letter or by text."""
    texts = [normalise(text) for text in question.choices]
    if not texts:
        raise Ungradable("the question has no choices")
    wanted = {_chosen(right, texts) for right in question.right()}
    if None in wanted:
        raise Ungradable(f"the reference {question.references!r} is none of the choices")
    return float(_chosen(answer, texts) in wanted)


def _chosen(text: str, choices: list[str]) -> int | None:
    said = normalise(text)
    if said in choices:
        return choices.index(said)
    letters = [ord(found[1]) - ord("A") for found in _LETTER.finditer(text.strip())]
    if len(said) == 1 and said.isalpha():
        letters = [ord(said.upper()) - ord("A")]
    known = [letter for letter in letters if letter < len(choices)]
    if known:
        return known[-1] if "answer" in said else known[0]
    named = [
        at for at, one in enumerate(choices) if re.search(rf"(?<!\w){re.escape(one)}(?!\w)", said)
    ]
    return named[0] if len(named) == 1 else None


_FENCE = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)


def json_value(question: Question, answer: str) -> float:
    """1 where the answer is JSON that fits the question's schema and equals a reference.

    Either may be missing, not both. A fenced block is read where the answer has one.
    """
    if question.schema is None:
        question.right()
    fenced = _FENCE.search(answer)
    try:
        value: Any = json.loads(fenced[1] if fenced else answer)
    except ValueError:
        return 0.0
    if question.schema is not None and not Draft202012Validator(question.schema).is_valid(value):
        return 0.0
    if not question.references:
        return 1.0
    try:
        return float(any(json.loads(right) == value for right in question.references))
    except ValueError:
        raise Ungradable(f"the reference {question.references!r} is not JSON") from None


EXACT = _plain("exact", exact)
CONTAINS = _plain("contains", contains)
REGEX = _kind(regex)
NUMERIC = _kind(numeric)
CHOICE = _plain("choice", choice)
JSON = _plain("json", json_value)
