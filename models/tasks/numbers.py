"""Numbers: sums bare and as stories, units turned into one another, words and Roman numerals.

Bare questions and word problems about the same numbers share an instance, so a held-out sum has
never been seen in any wording.
"""

import random
from typing import Final

from models.tasks.base import Domain, Draft, Instance, Skill

NAMES: Final = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lucy", "Max", "Emma")
ITEMS: Final = ("apples", "books", "coins", "pens", "cards", "stamps", "eggs", "balls")
_ADD: Final = (
    "What is {a} + {b}?",
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "What's {a} + {b}?",
    "How much is {a} + {b}?",
    "Calculate {a} + {b}.",
    "{a} + {b} = ?",
    "{a} + {b}",
    "{a}+{b}",
    "Add {a} and {b}.",
    "What is the sum of {a} and {b}?",
)
_ADD_STORY: Final = (
    "{x} has {a} {i} and buys {b} more. How many {i} does {x} have now?",
    "{x} has {a} {i} and {y} has {b} {i}. How many {i} do they have together?",
    "There are {a} {i} in one box and {b} in another box. How many {i} are there in all?",
    "{x} read {a} pages on Monday and {b} pages on Tuesday. How many pages is that in all?",
    "A bus carries {a} people and {b} more get on. How many people are on the bus now?",
)
_SUB: Final = (
    "What is {a} - {b}?",
    "What is {a} - {b}?",
    "What is {a} minus {b}?",
    "What's {a} - {b}?",
    "How much is {a} - {b}?",
    "Calculate {a} - {b}.",
    "{a} - {b} = ?",
    "{a} - {b}",
    "{a}-{b}",
    "Subtract {b} from {a}.",
    "Take {b} away from {a}.",
)
_SUB_STORY: Final = (
    "{x} has {a} {i} and gives {b} to {y}. How many {i} does {x} have left?",
    "There were {a} birds in a tree and {b} flew away. How many birds are left?",
    "A shop had {a} {i} and sold {b}. How many {i} are left?",
    "{x} has {a} {i} and loses {b}. How many {i} are left?",
    "{x} has {a} {i} and {y} has {b}. How many more {i} does {x} have than {y}?",
)
_MUL: Final = (
    "What is {a} * {b}?",
    "What is {a} x {b}?",
    "What is {a} times {b}?",
    "What's {a} times {b}?",
    "Calculate {a} * {b}.",
    "{a} * {b} = ?",
    "{a} * {b}",
    "Multiply {a} by {b}.",
    "What is the product of {a} and {b}?",
)
_MUL_STORY: Final = (
    "Each box holds {a} {i}. How many {i} are in {b} boxes?",
    "{x} buys {b} packs of {a} {i}. How many {i} does {x} have?",
    "A ticket costs {a} dollars. How many dollars do {b} tickets cost?",
)
_DIV: Final = (
    "What is {a} / {b}?",
    "What is {a} divided by {b}?",
    "Divide {a} by {b}.",
    "Calculate {a} / {b}.",
    "{x} shares {a} {i} equally among {b} friends. How many {i} does each friend get?",
)
_THREE: Final = (
    "What is {a} + {b} + {c}?",
    "Calculate {a} + {b} + {c}.",
    "{a} + {b} + {c}",
    "Add {a}, {b} and {c}.",
    "{x} has {a} {i}, finds {b} and buys {c} more. How many {i} does {x} have now?",
)
_BUY_AND_GIVE: Final = (
    "What is {a} + {b} - {c}?",
    "Calculate {a} + {b} - {c}.",
    "{x} has {a} {i}, buys {b} more and gives {c} to {y}. How many {i} does {x} have left?",
)


def two_names(rng: random.Random) -> tuple[str, str]:
    """Two different first names."""
    first, second = rng.sample(NAMES, 2)
    return first, second


def _draft(
    rng: random.Random,
    templates: tuple[str, ...],
    instance: Instance | None,
    answer: int,
    **numbers: int,
) -> Draft:
    """Fill one of the templates with the numbers, names and things."""
    x, y = two_names(rng)
    question = rng.choice(templates).format(x=x, y=y, i=rng.choice(ITEMS), **numbers)
    return Draft(instance=instance, question=question, answer=str(answer))


def _add(rng: random.Random, templates: tuple[str, ...]) -> Draft:
    a, b = rng.randrange(100), rng.randrange(100)
    return _draft(rng, templates, ("add", min(a, b), max(a, b)), a + b, a=a, b=b)


def _subtract(rng: random.Random, templates: tuple[str, ...]) -> Draft:
    b, a = sorted((rng.randrange(100), rng.randrange(100)))
    return _draft(rng, templates, ("sub", a, b), a - b, a=a, b=b)


def _factors(rng: random.Random) -> tuple[int, int]:
    """A one-digit and a two-digit factor, in either order."""
    pair = [rng.randrange(2, 10), rng.randrange(11, 100)]
    rng.shuffle(pair)
    return pair[0], pair[1]


def _multiply(rng: random.Random, templates: tuple[str, ...]) -> Draft:
    a, b = _factors(rng)
    return _draft(rng, templates, ("mul", min(a, b), max(a, b)), a * b, a=a, b=b)


def _times_table(rng: random.Random) -> Draft:
    a, b = rng.randrange(11), rng.randrange(11)
    return _draft(rng, _MUL + _MUL_STORY[:2] if min(a, b) > 1 else _MUL, None, a * b, a=a, b=b)


def _divide(rng: random.Random) -> Draft:
    b, q = rng.randrange(2, 11), rng.randrange(2, 11)
    return _draft(rng, _DIV, None, q, a=b * q, b=b)


def _add_three(rng: random.Random) -> Draft:
    a, b, c = (rng.randrange(1, 21) for _ in range(3))
    low, middle, high = sorted((a, b, c))
    return _draft(rng, _THREE, ("add", low, middle, high), a + b + c, a=a, b=b, c=c)


def _buy_and_give(rng: random.Random) -> Draft:
    a, b = rng.randrange(1, 31), rng.randrange(1, 21)
    c = rng.randrange(1, min(a + b, 20) + 1)
    return _draft(rng, _BUY_AND_GIVE, ("add-sub", a, b, c), a + b - c, a=a, b=b, c=c)


ARITHMETIC: Final = Domain(
    name="arithmetic",
    skills=(
        Skill(name="add", weight=3, draw=lambda rng: _add(rng, _ADD)),
        Skill(name="subtract", weight=3, draw=lambda rng: _subtract(rng, _SUB)),
        Skill(name="multiply", weight=1, draw=lambda rng: _multiply(rng, _MUL)),
        Skill(name="times_table", weight=0.8, draw=_times_table, held_out=False),
        Skill(name="divide", weight=0.5, draw=_divide, held_out=False),
        Skill(name="add_three", weight=0.8, draw=_add_three),
    ),
)

STORIES: Final = Domain(
    name="stories",
    skills=(
        Skill(name="add_story", weight=1.5, draw=lambda rng: _add(rng, _ADD_STORY)),
        Skill(name="subtract_story", weight=1.5, draw=lambda rng: _subtract(rng, _SUB_STORY)),
        Skill(name="multiply_story", weight=0.4, draw=lambda rng: _multiply(rng, _MUL_STORY)),
        Skill(name="buy_and_give", weight=0.8, draw=_buy_and_give),
    ),
)


# (large unit, small unit, how many small ones make a large one, largest count of large units)
_DECIMAL_UNITS: Final = (
    ("km", "m", 1000, 400),
    ("kg", "g", 1000, 400),
    ("meters", "cm", 100, 400),
    ("dollars", "cents", 100, 400),
    ("cm", "mm", 10, 400),
    ("liters", "ml", 1000, 400),
)
_OTHER_UNITS: Final = (
    ("hours", "minutes", 60, 60),
    ("minutes", "seconds", 60, 60),
    ("weeks", "days", 7, 50),
    ("years", "months", 12, 40),
    ("feet", "inches", 12, 40),
    ("days", "hours", 24, 20),
)
_HOW_MANY: Final = (
    "How many {to} are in {n} {unit}?",
    "How many {to} are {n} {unit}?",
    "Convert {n} {unit} to {to}.",
    "What is {n} {unit} in {to}?",
    "{n} {unit} in {to}",
    "Change {n} {unit} into {to}.",
)
# (large unit, small unit, how many small ones make a large one)
_TOGETHER: Final = (
    ("hours", "minutes", 60),
    ("dollars", "cents", 100),
    ("meters", "cm", 100),
    ("weeks", "days", 7),
    ("feet", "inches", 12),
)
_MIXED: Final = (
    "How many {small} are {a} {large} and {b} {small}?",
    "How many {small} are in {a} {large} and {b} {small}?",
    "Convert {a} {large} and {b} {small} to {small}.",
)


def _units(rng: random.Random, table: tuple[tuple[str, str, int, int], ...]) -> Draft:
    large, small, factor, most = rng.choice(table)
    count = rng.randint(2, most)
    if rng.random() < 0.6:
        number, unit, to, answer = count, large, small, count * factor
    else:
        number, unit, to, answer = count * factor, small, large, count
    question = rng.choice(_HOW_MANY).format(n=number, unit=unit, to=to)
    return Draft(instance=("unit", large, count), question=question, answer=str(answer))


def _mixed_units(rng: random.Random) -> Draft:
    large, small, factor = rng.choice(_TOGETHER)
    a, b = rng.randint(2, 9), rng.randint(1, factor - 1)
    question = rng.choice(_MIXED).format(large=large, small=small, a=a, b=b)
    return Draft(instance=("mixed", large, a, b), question=question, answer=str(factor * a + b))


CONVERSION: Final = Domain(
    name="conversion",
    skills=(
        Skill(name="decimal_units", weight=2, draw=lambda rng: _units(rng, _DECIMAL_UNITS)),
        Skill(name="other_units", weight=1.2, draw=lambda rng: _units(rng, _OTHER_UNITS)),
        Skill(name="mixed_units", weight=1.5, draw=_mixed_units),
    ),
)


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
