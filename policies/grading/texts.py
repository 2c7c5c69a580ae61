"""Graders that compare each answer's text with the question's references."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import regex as patterns
from jsonschema import Draft202012Validator

from policies.cascade.base import normalise
from policies.errors import PolicyError
from policies.grading.base import Graded, GraderKind, GradingContext, Question, Ungradable
from policies.json_text import read_json_text

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
    return float(any(_plainly(answer, right) == right for right in map(_wanted, question.right())))


def contains(question: Question, answer: str) -> float:
    """1 where a reference stands in the answer as whole words and numbers, case and spacing aside.

    So 5 is neither in 15 nor in 2.5.
    """
    rights = map(_wanted, question.right())
    return float(any(_standing(right).search(_plainly(answer, right)) for right in rights))


# Letters of scripts that put no space between words (or, as Korean, none before particles): Thai to
# Khmer, Chinese and Japanese, Hangul.
_UNSPACED: Final = r"\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_SPACED: Final = rf"(?:(?![{_UNSPACED}])\w)"


def _standing(text: str) -> re.Pattern[str]:
    """Return the pattern of `text` that is not a part of a longer word or number.

    Where a script puts no spaces, nobody can tell: there it may stand anywhere.
    """
    before = rf"(?<!{_SPACED})(?<!\d[.,])" if re.match(_SPACED, text) else ""
    after = rf"(?!{_SPACED})(?![.,]\d)" if re.search(_SPACED + r"\Z", text) else ""
    return re.compile(before + re.escape(text) + after)


def _wanted(reference: str) -> str:
    """Return a reference as it is compared: normalised, unless nothing of it ("!") would be left.

    Raises `Ungradable` for an empty one, which every answer would have.
    """
    if not reference.strip():
        raise Ungradable("the reference is empty")
    return normalise(reference) or reference.strip()


def _plainly(answer: str, wanted: str) -> str:
    return normalise(answer) if normalise(wanted) else answer.strip()


def regex(argument: str) -> Compare:
    """1 where the argument, or without one a reference, is found in the answer as a pattern.

    A pattern that takes longer than `LONGEST_SEARCH_S` with an answer gives it no score.
    """
    fixed = _compiled(argument, PolicyError) if argument else None

    def compare(question: Question, answer: str) -> float:
        tried = [fixed] if fixed else [_compiled(p, Ungradable) for p in question.right()]
        try:
            found = (one.search(answer, timeout=LONGEST_SEARCH_S) for one in tried)
            return float(any(found))
        except TimeoutError:
            raise Ungradable(
                f"regex {[one.pattern for one in tried]} took over {LONGEST_SEARCH_S:g} s"
                f" with an answer of {len(answer):,} characters"
            ) from None

    return compare


LONGEST_SEARCH_S: Final = 1.0
"""Some patterns take time that doubles with each character; the whole collecting would wait."""


def _compiled(pattern: str, error: type[Exception]) -> patterns.Pattern[str]:
    try:
        return patterns.compile(pattern)
    except patterns.error as problem:
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
# A sign that follows a figure or a letter joins two things, as in 2010-2015.
_NUMBER = re.compile(
    r"(?:(?<!\w)[-+−])?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?"
    r"(?P<below>(?:\s?/\s?\d+(?:\.\d+)?)*)(?:\s?(?P<unit>%|[a-z]+))?",
    re.I,
)


# Fractions as LaTeX has them and as one sign; a whole number may stand before either.
_FRACTION: Final = re.compile(
    r"(?P<whole>\d)?(?:\\[dt]?frac\{(?P<above>\d+)\}\{(?P<below>\d+)\}"
    r"|(?P<sign>[\u00bc-\u00be\u2150-\u215e]))"
)
_MIXED: Final = re.compile(r"(?<![\d.,/])(\d{1,9})\s+(\d{1,9})\s?/\s?(\d{1,9})(?![\d.]|\s?/)")


def numeric(argument: str) -> Compare:
    """1 where the answer's last number, or fraction, is a reference's, within a relative tolerance.

    The argument is the tolerance (default 1e-6). Units of length, mass, time and volume, and
    percentages, are converted where both sides name one; a side without a unit means the other's.
    """
    try:
        tolerance = float(argument or 1e-6)
    except ValueError:
        raise PolicyError(f"grade: numeric:{argument}: the tolerance is not a number") from None
    if not 0 <= tolerance < 1:
        raise PolicyError(f"grade: numeric:{argument}: the tolerance is not in [0, 1)")

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
    text = _MIXED.sub(_whole_and_part, _FRACTION.sub(_in_figures, text))
    for match in _NUMBER.finditer(text):
        unit, below = (match["unit"] or "").lower(), match["below"].split("/")[1:]
        digits = text[match.start() : match.start("below")]
        value = float(digits.replace(",", "").replace("−", "-"))
        if len(below) == 1 and float(below[0]):
            value /= float(below[0])
        elif below:  # a date, say
            value = float(below[-1])
        if math.isfinite(value):
            last = value, unit if unit in _UNITS else ""
    return last


def _in_figures(fraction: re.Match[str]) -> str:
    sign = unicodedata.normalize("NFKC", fraction["sign"] or "").replace("\N{FRACTION SLASH}", "/")
    figures = sign or f"{fraction['above']}/{fraction['below']}"
    return f"{fraction['whole']} {figures}" if fraction["whole"] else figures


def _whole_and_part(mixed: re.Match[str]) -> str:
    whole, above, below = (int(digits) for digits in mixed.groups())
    return str(whole + above / below) if above < below else mixed[0]


def _same(one: tuple[float, str], other: tuple[float, str], tolerance: float) -> bool:
    (a, unit_a), (b, unit_b) = one, other
    if unit_a and unit_b:
        (kind_a, size_a), (kind_b, size_b) = _UNITS[unit_a], _UNITS[unit_b]
        return kind_a == kind_b and math.isclose(a * size_a, b * size_b, rel_tol=tolerance)
    return math.isclose(a, b, rel_tol=tolerance)


# A letter that is marked as one, "(B)", "B.", "**B**" or "answer is B", or stands alone; others
# may be words: "A cat", "I think".
_BEFORE: Final = r"(?<![A-Za-z0-9_'])"
_MARKED: Final = re.compile(
    r"(?i:\b(?:answer(?:\s+is)?|option|choice)\b)[\s:*(\[{]*([A-Z])(?![A-Za-z0-9_'])"
    r"|(?<![A-Za-z0-9_'(\[{*])[(\[{*]++([A-Za-z])[)\]}*]+"
    r"|^[^\w\n]*([A-Z])(?:[.:),]|[^\w\n]*$)"
    rf"|{_BEFORE}([A-Za-z])[)](?!\w)",
    re.MULTILINE,
)
_LETTER: Final = re.compile(rf"{_BEFORE}([A-Z])(?![A-Za-z0-9_'])")


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
    """Return the choice that `text` names: by its whole text, a marked letter (the last, as answers
    end with what they conclude), the only text that stands in it, or the only letter."""
    said = normalise(text)
    if said in choices:
        return choices.index(said)
    alone = said.upper() if len(said) == 1 else ""
    marked = [next(filter(None, found)).upper() for found in _MARKED.findall(alone or text)]
    concluded = _places(marked, choices)
    if concluded:
        return concluded[-1]
    named = [at for at, one in enumerate(choices) if one and _standing(one).search(said)]
    found = named or _places(dict.fromkeys(_LETTER.findall(text)), choices)
    return found[0] if len(found) == 1 else None


def _places(letters: Iterable[str], choices: list[str]) -> list[int]:
    return [at for at in (ord(letter) - ord("A") for letter in letters) if at < len(choices)]


_FENCE = re.compile(r"```(?:json)?(.*?)```", re.DOTALL)


def json_value(question: Question, answer: str) -> float:
    """1 where the answer is JSON that fits the question's schema and equals a reference.

    Either may be missing, not both. A fenced block is read where the answer has one.
    """
    schema = question.schema
    if schema is None:
        question.right()
    fenced = _FENCE.search(answer)
    try:
        value = read_json_text(fenced[1] if fenced else answer)
    except ValueError:
        return 0.0
    try:
        if schema is not None and not Draft202012Validator(schema).is_valid(value):
            return 0.0
    except Exception as error:  # whatever a schema that is none leads to
        raise Ungradable(f"the schema cannot be used: {type(error).__name__}: {error}") from None
    if not question.references:
        return 1.0
    try:
        return float(any(_equal(read_json_text(right), value) for right in question.references))
    except ValueError:
        raise Ungradable(f"the reference {question.references!r} is not JSON") from None


def _equal(one: Any, other: Any) -> bool:  # noqa: ANN401
    """Return whether two JSON values are equal; to Python true would be 1."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


EXACT = _plain("exact", exact)
CONTAINS = _plain("contains", contains)
REGEX = _kind(regex)
NUMERIC = _kind(numeric)
CHOICE = _plain("choice", choice)
JSON = _plain("json", json_value)
