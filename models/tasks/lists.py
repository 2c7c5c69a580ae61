"""Elements of short lists of numbers or made-up words: sort, pick, count, reverse.

A list is one instance whatever is asked about it.
"""

import random
from collections.abc import Callable, Sequence
from typing import Final

from models.tasks.base import Domain, Draft, Skill
from models.tasks.words import made_up_word

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
