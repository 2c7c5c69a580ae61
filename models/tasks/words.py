"""Made-up words and everyday names: raw material for the questions."""

import random
from typing import Final

_CONSONANTS: Final = "bcdfghjklmnprstvwz"
_VOWELS: Final = "aeiou"
_SHAPES: Final = (
    *("cvc", "vcv", "cvcv", "cvcc", "ccvc"),
    *("cvcvc", "vcvcv", "cvccv", "cvcvcv", "ccvcvc"),
)
_SHAPE_WEIGHTS: Final = (3, 1, 5, 2, 2, 5, 1, 3, 3, 2)

NAMES: Final = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lucy", "Max", "Emma")
ITEMS: Final = ("apples", "books", "coins", "pens", "cards", "stamps", "eggs", "balls")


def made_up_word(rng: random.Random, max_letters: int = 6) -> str:
    """A pronounceable lower-case word of 3 to `max_letters` letters (about 2.5 million of them)."""
    while True:
        shape = rng.choices(_SHAPES, _SHAPE_WEIGHTS)[0]
        if len(shape) <= max_letters:
            return "".join(rng.choice(_CONSONANTS if c == "c" else _VOWELS) for c in shape)


def two_names(rng: random.Random) -> tuple[str, str]:
    """Two different first names."""
    first, second = rng.sample(NAMES, 2)
    return first, second
