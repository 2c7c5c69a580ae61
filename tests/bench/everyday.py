"""Everyday requests: what people ask an assistant, which no chunk of the default pool knows.

What has one right answer (facts, sorted lists) is held to it. Of the rest an answer counts as
usable if it is a few English words, about what was asked, that do not go round in circles and are
not the chunks' own phrases. That tells an assistant from a calculator, not good advice from bad.

A subject belongs to one split, whatever is asked of it, so that what a router learns on some is
tested on others.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from models.tasks.base import Split

REQUESTS: Final = Path(__file__).with_suffix(".yaml")

_WORD: Final = re.compile(r"[^\W\d_]+")
_LEAST_WORDS: Final = 6
_LOOP_WORDS: Final = 4
_MOST_REPEATED: Final = 0.3
_LEAST_COMMON: Final = 0.2
_STEM_LETTERS: Final = 5
# Of English prose they are a third to a half.
_COMMON: Final = frozenset(
    _WORD.findall(
        "a about all also an and any are as at be been but by can could do does for from had has "
        "have he her his how i if in into is it its like may me more most my no not of on one or "
        "our out she so some such than that the their them there these they this to up us was we "
        "were what when where which who will with would you your"
    )
)
# What requests consist of beside their subject.
_ASKING: Final = frozenset(
    _WORD.findall(
        "answer best called child describe difference everything explain facts friendly get give "
        "good help important know let make mean meaning need new next please point say sentences "
        "short should simple start story suggest summarise tell things think three time tips two "
        "want way why word words work world write paragraph"
    )
)
_TOYS_PHRASES: Final = re.compile(
    r"roman numeral|(?:a|de)scending order|(?:upper|lower) case|digits|24-hour|iso (?:iso|date)"
    r"|python expression|in reverse|(?:last|first|smallest|largest) number in|value of '"
    r"|letter of",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Everyday:
    """One request. `accepted` are texts of which a right answer has one; where there are none, a
    usable one has a word that begins like one in `about`, if that has any."""

    text: str
    kind: str
    split: Split
    accepted: tuple[str, ...] = ()
    about: frozenset[str] = frozenset()

    def grade(self, answer: str) -> float:
        """Return 1 for a right or usable answer, else 0."""
        if self.accepted:
            return float(right(answer, self.accepted))
        return float(usable(answer, self.about))


def right(answer: str, accepted: Iterable[str]) -> bool:
    """Return whether an answer has the words of one of the accepted texts, in their order."""
    said = f" {_plain(answer)} "
    return any(f" {_plain(text)} " in said for text in accepted)


def usable(answer: str, about: Iterable[str]) -> bool:
    """Return whether an answer is some English about what was asked, and no chunk's."""
    words = [word.lower() for word in _WORD.findall(answer)]
    if len(words) < _LEAST_WORDS or _TOYS_PHRASES.search(answer):
        return False
    common = sum(word in _COMMON for word in words) / len(words)
    runs = list(zip(*(words[i:] for i in range(_LOOP_WORDS)), strict=False))
    repeated = 1 - len(set(runs)) / len(runs)
    stems = tuple(word[:_STEM_LETTERS] for word in about)
    on_topic = not stems or any(word.startswith(stems) for word in words)
    return common >= _LEAST_COMMON and repeated <= _MOST_REPEATED and on_topic


def subject_words(text: str) -> frozenset[str]:
    """Return the words of a request, or its subject, that say what it is about."""
    words = {word for word in _WORD.findall(text.lower()) if len(word) > 2}
    return frozenset(words - _COMMON - _ASKING)


def everyday() -> Iterator[Everyday]:
    """Yield all requests, always the same in the same order."""
    for group in yaml.safe_load(REQUESTS.read_text("utf-8")):
        forms, answers = group["forms"], group.get("answers", {})
        for subject in answers or group["subjects"]:
            for form in forms:
                about = _words_for(forms, form) + _words_for(group.get("subjects", ()), subject)
                yield Everyday(
                    text=form.format(subject),
                    kind=group["kind"],
                    split=_split(subject),
                    accepted=tuple(answers[subject].split("|")) if answers else (),
                    about=frozenset(about) or subject_words(subject),
                )


def _words_for(group: Sequence[str] | Mapping[str, str], key: str) -> list[str]:
    return group[key].split() if isinstance(group, Mapping) else []


def _split(subject: str) -> Split:
    """Return where a subject belongs: a third of them to the test."""
    digest = hashlib.blake2b(subject.encode(), digest_size=8).digest()
    return Split.TEST if int.from_bytes(digest, "big") % 3 == 0 else Split.ROUTER


def _plain(text: str) -> str:
    """Return a text's words and numbers in small letters, without what joins or counts them."""
    words = re.findall(r"\w+", re.sub(r"(?m)^\s*\d+[.)]\s", "", text).lower())
    return " ".join(word for word in words if word != "and")
