"""Numbers written as English words and as Roman numerals."""

import random
from typing import Final

from models.tasks.base import Domain, Draft, Skill

_SMALL: Final = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
_TENS: Final = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_ROMAN: Final = (
    *((90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")),
)
_TO_WORDS: Final = ("Write {n} in words.", "Write the number {n} in words.")
_TO_DIGITS: Final = ("Write {w} in digits.", "What is {w} in digits?", "Convert {w} to digits.")
_TO_ROMAN: Final = (
    "Write {n} as a Roman numeral.",
    "Convert {n} to a Roman numeral.",
    "What is {n} as a Roman numeral?",
)
_FROM_ROMAN: Final = (
    "What number is the Roman numeral {r}?",
    "What is the value of the Roman numeral {r}?",
    "Convert the Roman numeral {r} to a number.",
)


def in_words(number: int) -> str:
    """The English words for a number from 0 to 999."""
    if number >= 100:
        rest = f" {in_words(number % 100)}" if number % 100 else ""
        return f"{_SMALL[number // 100]} hundred{rest}"
    if number < 20:
        return _SMALL[number]
    unit = f"-{_SMALL[number % 10]}" if number % 10 else ""
    return _TENS[number // 10 - 2] + unit


def in_roman(number: int) -> str:
    """The Roman numeral of a number from 1 to 99."""
    numeral = ""
    for value, letters in _ROMAN:
        count, number = divmod(number, value)
        numeral += letters * count
    return numeral


def number_words(rng: random.Random) -> Draft:
    """Two-digit numbers to words, or the words of up to three digits to digits."""
    if rng.random() < 0.5:
        number = rng.randint(1, 99)
        question, answer = rng.choice(_TO_WORDS).format(n=number), in_words(number)
    else:
        number = rng.randint(1, 999)
        question, answer = rng.choice(_TO_DIGITS).format(w=in_words(number)), str(number)
    return Draft(instance=("number", number), question=question, answer=answer)


def roman_numerals(rng: random.Random) -> Draft:
    """A number to its Roman numeral or back."""
    number = rng.randint(1, 99)
    if rng.random() < 0.5:
        question, answer = rng.choice(_TO_ROMAN).format(n=number), in_roman(number)
    else:
        question, answer = rng.choice(_FROM_ROMAN).format(r=in_roman(number)), str(number)
    return Draft(instance=("number", number), question=question, answer=answer)


NUMERALS: Final = Domain(
    name="numerals",
    skills=(
        Skill(name="number_words", weight=1.2, draw=number_words),
        Skill(name="roman_numerals", weight=1, draw=roman_numerals),
    ),
)
