"""The value of a small Python expression, written as `print` would show it.

Every answer equals `str(eval(expression))`; the tests check that with Python itself.
"""

import random
from typing import Final

from models.tasks.base import Domain, Draft, Instance, Skill
from models.tasks.text import made_up_word

_ASK: Final = (
    "What is {e}?",
    "What does {e} give in Python?",
    "What is the value of {e}?",
    "What does {e} return?",
    "What does print({e}) show?",
    "Evaluate {e}.",
    "Evaluate the Python expression {e}.",
    "In Python, what is {e}?",
    "print({e})",
    "{e}",
)
_ASSIGNED: Final = (
    "If x = {a} and y = {b}, what is {e}?",
    "x = {a}; y = {b}; print({e})",
    "After x = {a}; y = {b}, what is {e}?",
)


def _draft(rng: random.Random, instance: Instance, expression: str, value: object) -> Draft:
    """Wrap the expression in a question; the answer is what `print(value)` shows."""
    question = rng.choice(_ASK).format(e=expression)
    return Draft(instance=instance, question=question, answer=str(value))


def _length(rng: random.Random) -> Draft:
    word = made_up_word(rng)
    k = rng.randint(1, 9)
    expression, value = rng.choice(
        (
            (f"len('{word}')", len(word)),
            (f"len('{word}') + {k}", len(word) + k),
            (f"len('{word}') * {k}", len(word) * k),
            (f"len('{word}') == {k}", len(word) == k),
            (f"{k} + len('{word}')", len(word) + k),
        )
    )
    return _draft(rng, ("word", word), expression, value)


def _numbers(rng: random.Random) -> list[int]:
    """3 or 4 numbers from 1 to 9, some of the lists from 1 to 99."""
    high = 10 if rng.random() < 0.7 else 100
    return [rng.randrange(1, high) for _ in range(rng.randint(3, 4))]


def _index(rng: random.Random) -> Draft:
    numbers = _numbers(rng)
    index = rng.randrange(-2, len(numbers))
    return _draft(rng, ("list", *numbers), f"{numbers}[{index}]", numbers[index])


def _list_function(rng: random.Random) -> Draft:
    numbers = _numbers(rng)
    k, guess = rng.randrange(len(numbers)), rng.randrange(1, 10)
    expression, value = rng.choice(
        (
            (f"len({numbers})", len(numbers)),
            (f"max({numbers})", max(numbers)),
            (f"min({numbers})", min(numbers)),
            (f"sorted({numbers})[{k}]", sorted(numbers)[k]),
            (f"{numbers[k]} in {numbers}", True),
            (f"{guess} in {numbers}", guess in numbers),
        )
    )
    return _draft(rng, ("list", *numbers), expression, value)


def _sum(rng: random.Random) -> Draft:
    numbers = [rng.randrange(1, 10) for _ in range(3)]
    return _draft(rng, ("list", *numbers), f"sum({numbers})", sum(numbers))


def _string(rng: random.Random) -> Draft:
    word = made_up_word(rng)
    i = rng.randrange(-1, len(word))
    expression, value = rng.choice(
        (
            (f"'{word}'[{i}]", word[i]),
            (f"'{word}'[::-1]", word[::-1]),
            (f"'{word}'.upper()", word.upper()),
            (f"'{word}'[:2]", word[:2]),
            (f"'{word}'[1:3]", word[1:3]),
            (f"'{word}'[2:]", word[2:]),
            (f"'{word[1]}' in '{word}'", True),
            (f"'{rng.choice('aeiou')}' in '{word}'", None),
        )
    )
    if value is None:
        value = expression[1] in word
    return _draft(rng, ("word", word), expression, value)


def _repeat_or_join(rng: random.Random) -> Draft:
    word, other = made_up_word(rng, 4), made_up_word(rng, 4)
    if rng.random() < 0.5:
        short, times = word[: rng.randint(1, 3)], rng.randint(2, 4)
        return _draft(rng, ("repeat", short, times), f"'{short}' * {times}", short * times)
    return _draft(rng, ("words", word, other), f"'{word}' + '{other}'", word + other)


def _two_numbers(rng: random.Random) -> Draft:
    a, b = rng.randrange(1, 100), rng.randrange(1, 100)
    expression, value = rng.choice(
        (
            (f"max({a}, {b})", max(a, b)),
            (f"min({a}, {b})", min(a, b)),
            (f"{a} < {b}", a < b),
            (f"{a} > {b}", a > b),
            (f"str({a}) + '{b}'", f"{a}{b}"),
            (f"str({a}) + str({b})", f"{a}{b}"),
        )
    )
    return _draft(rng, ("numbers", min(a, b), max(a, b)), expression, value)


def _small_numbers(rng: random.Random) -> Draft:
    a, b, c = rng.randrange(1, 10), rng.randrange(1, 10), rng.randrange(1, 10)
    expression, value = rng.choice(
        (
            (f"max({a}, {b}) + {c}", max(a, b) + c),
            (f"min({a}, {b}) + {c}", min(a, b) + c),
            (f"abs({a} - {b}) + {c}", abs(a - b) + c),
            (f"int('{a}') + {b} + {c}", a + b + c),
            (f"({a} + {b}) * {c}", (a + b) * c),
            (f"{a} + {b} * {c}", a + b * c),
        )
    )
    return _draft(rng, ("numbers", a, b, c), expression, value)


def _assignment(rng: random.Random) -> Draft:
    a, b = rng.randrange(1, 20), rng.randrange(1, 10)
    expression, value = rng.choice(
        (
            ("x + y", a + b),
            ("x - y", a - b),
            ("x * y", a * b) if a < 10 else ("y - x", b - a),
            ("max(x, y)", max(a, b)),
            ("x < y", a < b),
            ("[x, y][1]", b),
        )
    )
    question = rng.choice(_ASSIGNED).format(a=a, b=b, e=expression)
    return Draft(instance=("numbers", min(a, b), max(a, b)), question=question, answer=str(value))


def _modulo(rng: random.Random) -> Draft:
    a, b = rng.randrange(2, 60), rng.randrange(2, 11)
    expression, value = rng.choice(((f"{a} % {b}", a % b), (f"{a} // {b}", a // b)))
    return _draft(rng, ("modulo", a, b), expression, value)


CODE: Final = Domain(
    name="code",
    skills=(
        Skill(name="length", weight=1.6, draw=_length),
        Skill(name="index", weight=1.4, draw=_index),
        Skill(name="list_function", weight=1.8, draw=_list_function),
        Skill(name="sum", weight=0.4, draw=_sum),
        Skill(name="string", weight=2, draw=_string),
        Skill(name="repeat_or_join", weight=1.4, draw=_repeat_or_join),
        Skill(name="two_numbers", weight=1.2, draw=_two_numbers),
        Skill(name="small_numbers", weight=1.2, draw=_small_numbers),
        Skill(name="assignment", weight=0.8, draw=_assignment),
        Skill(name="modulo", weight=0.5, draw=_modulo),
    ),
)
