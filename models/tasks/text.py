"""Letters of made-up words: reverse, pick, count, spell, change case.

A word is one instance whatever is asked about it.
"""

import random
from typing import Final

from models.tasks.base import Domain, Draft, Skill
from models.tasks.words import made_up_word

_ORDINALS: Final = ("first", "second", "third", "fourth", "fifth", "sixth")
_SHORT_ORDINALS: Final = ("1st", "2nd", "3rd", "4th", "5th", "6th")

_REVERSE: Final = (
    "Reverse the word {w}.",
    "Reverse {w}.",
    "What is {w} spelled backwards?",
    "Spell {w} backwards.",
    "Write {w} in reverse.",
)
_LETTER: Final = (
    "What is the {n} letter of {w}?",
    "Which letter comes {n} in {w}?",
    "Give the {n} letter of the word {w}.",
    "What's the {n} letter in {w}?",
)
_UPPER: Final = (
    "Write {w} in upper case.",
    "Write {w} in capital letters.",
    "Uppercase the word {w}.",
    "Put {w} in capitals.",
)
_HYPHENS: Final = ("Spell {w} with hyphens.", "Write {w} with a hyphen between the letters.")
_COUNT_LETTERS: Final = (
    "How many letters are in {w}?",
    "How many letters does the word {w} have?",
    "Count the letters in {w}.",
    "How long is the word {w}?",
)
_STARTS: Final = (
    "What are the first two letters of {w}?",
    "What are the last two letters of {w}?",
)


def _quoted(rng: random.Random, word: str) -> str:
    """The word in single quotes, double quotes or bare."""
    draw = rng.random()
    return f"'{word}'" if draw < 0.5 else f'"{word}"' if draw < 0.75 else word


def _word_draft(rng: random.Random, templates: tuple[str, ...], word: str, answer: str) -> Draft:
    question = rng.choice(templates).format(w=_quoted(rng, word))
    return Draft(instance=("word", word), question=question, answer=answer)


def _reverse(rng: random.Random) -> Draft:
    word = made_up_word(rng)
    return _word_draft(rng, _REVERSE, word, word[::-1])


def _letter(rng: random.Random) -> Draft:
    word = made_up_word(rng)
    index = rng.randrange(-1, len(word))
    name = "last" if index < 0 else rng.choice((_ORDINALS, _ORDINALS, _SHORT_ORDINALS))[index]
    question = rng.choice(_LETTER).format(n=name, w=_quoted(rng, word))
    return Draft(instance=("word", word), question=question, answer=word[index])


def _upper(rng: random.Random) -> Draft:
    word = made_up_word(rng)
    return _word_draft(rng, _UPPER, word, word.upper())


def _hyphens(rng: random.Random) -> Draft:
    word = made_up_word(rng)
    return _word_draft(rng, _HYPHENS, word, "-".join(word))


def _count_letters(rng: random.Random) -> Draft:
    word = made_up_word(rng)
    return _word_draft(rng, _COUNT_LETTERS, word, str(len(word)))


def _two_letters(rng: random.Random) -> Draft:
    word = made_up_word(rng)
    template = rng.choice(_STARTS)
    return _word_draft(rng, (template,), word, word[:2] if "first" in template else word[-2:])


TEXT: Final = Domain(
    name="text",
    skills=(
        Skill(name="reverse", weight=2, draw=_reverse),
        Skill(name="letter", weight=2, draw=_letter),
        Skill(name="upper", weight=1, draw=_upper),
        Skill(name="hyphens", weight=0.7, draw=_hyphens),
        Skill(name="count_letters", weight=1, draw=_count_letters),
        Skill(name="two_letters", weight=0.8, draw=_two_letters),
    ),
)
