"""Units of length, mass, volume, money and time turned into one another."""

import random
from typing import Final

from models.tasks.base import Domain, Draft, Skill

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
