"""Graders that compare each answer's text with the references (`numbers` its number)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
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


def each_alone(make: Callable[[str], Compare]) -> GraderKind:
    """Return the kind whose graders compare answers as `make` says of their argument."""

    def build(argument: str, _: GradingContext) -> Each:
        return Each(make(argument))

    return GraderKind(build)


def _plain(name: str, compare: Compare) -> GraderKind:
    def make(argument: str) -> Compare:
        if argument:
            raise PolicyError(f"grade: {name} takes no argument, got {argument!r}")
        return compare

    return each_alone(make)


def exact(question: Question, answer: str) -> float:
    """1 where the answer equals a reference but for case, spacing and closing punctuation."""
    return float(any(_plainly(answer, right) == right for right in map(_wanted, question.right())))


def contains(question: Question, answer: str) -> float:
    """1 where a reference stands in the answer as whole words and numbers, case and spacing aside.

    So 5 is neither in 15 nor in 2.5 or -5.
    """
    rights = map(_wanted, question.right())
    return float(any(_standing(right).search(_plainly(answer, right)) for right in rights))


# Letters of scripts that put no space between words (or, as Korean, none before particles): Thai to
# Khmer, Chinese and Japanese, Hangul.
_UNSPACED: Final = r"\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
_SPACED: Final = rf"(?:(?![{_UNSPACED}])\w)"
SIGN: Final = "[-−–]"
"""A minus, however it is typeset."""


def _standing(text: str) -> re.Pattern[str]:
    """Return the pattern of `text` that is not a part of a longer word or number.

    Where a script puts no spaces, nobody can tell: there it may stand anywhere.
    """
    before = rf"(?<!{_SPACED})(?<!\d[.,])" if re.match(_SPACED, text) else ""
    before += rf"(?<!(?<!\w){SIGN})" if re.match(r"\d", text) else ""
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


# A letter that is marked as one, "(B)", "B.", "**B**" or "answer is B", or stands alone; others
# may be words: "A cat", "I think".
_BEFORE: Final = r"(?<![A-Za-z0-9_'])"
_MARKED: Final = re.compile(
    r"(?i:\b(?:answer(?:\s+is)?|option|choice)\b)[\s:*(\[{]*"
    r"([A-Z](?![A-Za-z0-9_'])|[a-z](?=[\s.*)\]}]*$))"
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
    named = []
    for one in sorted(filter(None, choices), key=len, reverse=True):
        # The longest first: what stands within another choice alone is not named by it.
        said, times = _standing(one).subn(" | ", said)
        named += [choices.index(one)] if times else []
    found = named or _places(dict.fromkeys(_LETTER.findall(text)), choices)
    return found[0] if len(found) == 1 else None


def _places(letters: Iterable[str], choices: list[str]) -> list[int]:
    return [at for at in (ord(letter) - ord("A") for letter in letters) if at < len(choices)]


_FENCE = re.compile(r"```\w*(.*?)(?:```|\Z)", re.DOTALL)


def json_value(question: Question, answer: str) -> float:
    """1 where the answer is JSON that fits the question's schema and equals a reference.

    Either may be missing, not both. Where the answer as it is is none, its fenced block is read.
    """
    schema = question.schema
    if schema is None:
        question.right()
    fenced = _FENCE.search(answer)
    try:
        value = _read_first([answer, *([fenced[1]] if fenced else [])])
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


def _read_first(texts: list[str]) -> Any:  # noqa: ANN401 - any value
    """Return what the first of `texts` that is JSON says; raises `ValueError` where none is."""
    *others, last = texts
    for text in others:
        with suppress(ValueError):
            return read_json_text(text)
    return read_json_text(last)


def _equal(one: Any, other: Any) -> bool:  # noqa: ANN401
    """Return whether two JSON values are equal; to Python true would be 1."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


EXACT = _plain("exact", exact)
CONTAINS = _plain("contains", contains)
REGEX = each_alone(regex)
CHOICE = _plain("choice", choice)
JSON = _plain("json", json_value)
