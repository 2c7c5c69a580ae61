"""Letters of made-up words, and elements of short lists: reverse, pick, count, sort, spell.

A word or a list is one instance whatever is asked about it.
"""

import random
from collections.abc import Callable, Sequence
from typing import Final

from models.tasks.base import Domain, Draft, Skill

_CONSONANTS: Final = "bcdfghjklmnprstvwz"
_VOWELS: Final = "aeiou"
_SHAPES: Final = (
    *("cvc", "vcv", "cvcv", "cvcc", "ccvc"),
    *("cvcvc", "vcvcv", "cvccv", "cvcvcv", "ccvcvc"),
)
_SHAPE_WEIGHTS: Final = (3, 1, 5, 2, 2, 5, 1, 3, 3, 2)
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


def made_up_word(rng: random.Random, max_letters: int = 6) -> str:
    """A pronounceable lower-case word of 3 to `max_letters` letters (about 2.5 million of them)."""
    while True:
        shape = rng.choices(_SHAPES, _SHAPE_WEIGHTS)[0]
        if len(shape) <= max_letters:
            return "".join(rng.choice(_CONSONANTS if c == "c" else _VOWELS) for c in shape)


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


_SORT_UP: Final = (
    "Sort {l}.",
    "Sort the numbers {l}.",
    "Put {l} in order from smallest to largest.",
    "Sort {l} in ascending order.",
)
_SORT_DOWN: Final = (
    "Sort {l} in descending order.",
    "Put {l} in order from largest to smallest.",
)
_PICK: Final[tuple[tuple[str, Callable[[Sequence[int]], int]], ...]] = (
    ("What is the largest number in {l}?", max),
    ("What is the biggest of {l}?", max),
    ("What is the smallest number in {l}?", min),
    ("Which number is smallest: {l}?", min),
    ("What is the last number in {l}?", lambda xs: xs[-1]),
    ("What is the first number in {l}?", lambda xs: xs[0]),
    ("What is the second number in {l}?", lambda xs: xs[1]),
    ("How many numbers are in {l}?", len),
    ("Count the numbers in {l}.", len),
)
_REVERSE_LIST: Final = ("Reverse the list {l}.", "Write the list {l} backwards.")
_PICK_WORD: Final[tuple[tuple[str, Callable[[Sequence[str]], str]], ...]] = (
    ("What is the last word in {l}?", lambda ws: ws[-1]),
    ("What is the first word in {l}?", lambda ws: ws[0]),
    ("What is the second word in {l}?", lambda ws: ws[1]),
    ("Which word is longest: {l}?", lambda ws: max(ws, key=len)),
    ("Which word is shortest: {l}?", lambda ws: min(ws, key=len)),
)


def _numbers(rng: random.Random, most: int) -> list[int]:
    """3 to `most` different numbers, half of the lists with one digit each."""
    return rng.sample(range(1, 10) if rng.random() < 0.5 else range(10, 100), rng.randint(3, most))


def _joined(items: Sequence[object]) -> str:
    return ", ".join(map(str, items))


def _sort(rng: random.Random) -> Draft:
    numbers = _numbers(rng, 4)
    down = rng.random() < 0.35
    question = rng.choice(_SORT_DOWN if down else _SORT_UP).format(l=_joined(numbers))
    answer = _joined(sorted(numbers, reverse=down))
    return Draft(instance=("list", *numbers), question=question, answer=answer)


def _pick(rng: random.Random) -> Draft:
    numbers = _numbers(rng, 5)
    template, pick = rng.choice(_PICK)
    question = template.format(l=_joined(numbers))
    return Draft(instance=("list", *numbers), question=question, answer=str(pick(numbers)))


def _reverse_list(rng: random.Random) -> Draft:
    numbers = _numbers(rng, 4)
    question = rng.choice(_REVERSE_LIST).format(l=_joined(numbers))
    return Draft(instance=("list", *numbers), question=question, answer=_joined(numbers[::-1]))


def _pick_word(rng: random.Random) -> Draft:
    words: list[str] = []
    for letters in rng.sample((3, 4, 5), 3):
        word = made_up_word(rng, letters)
        while len(word) != letters:
            word = made_up_word(rng, letters)
        words.append(word)
    template, pick = rng.choice(_PICK_WORD)
    question = template.format(l=_joined(words))
    return Draft(instance=("words", *words), question=question, answer=pick(words))


LISTS: Final = Domain(
    name="lists",
    skills=(
        Skill(name="sort", weight=1.5, draw=_sort),
        Skill(name="pick", weight=2, draw=_pick),
        Skill(name="reverse_list", weight=0.8, draw=_reverse_list),
        Skill(name="pick_word", weight=1, draw=_pick_word),
    ),
)
