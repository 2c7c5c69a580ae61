"""Sums, differences, products and quotients of small numbers: bare, and as stories.

Bare questions and word problems about the same numbers share an instance, so a held-out sum has
never been seen in any wording.
"""

import random
from typing import Final

from models.tasks.base import Domain, Draft, Instance, Skill
from models.tasks.words import ITEMS, two_names

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
