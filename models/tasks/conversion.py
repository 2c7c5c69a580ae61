"""Units, clock times, weekdays, months and dates turned into one another.

Dates lie in a year of 365 days. Clock times use 24 hours unless am or pm is written.
"""

import datetime
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
_WEEKDAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS: Final = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
_WEEKDAY: Final = (
    "What day is {n} days {way} {d}?",
    "Which day of the week comes {n} days {way} {d}?",
    "What weekday is it {n} days {way} {d}?",
)
_MONTH: Final = (
    "What month is {n} months {way} {d}?",
    "Which month comes {n} months {way} {d}?",
)
_CLOCK: Final = (
    "What time is it {n} minutes {way} {t}?",
    "What is the time {n} minutes {way} {t}?",
)
_DATE: Final = ("What date is {n} days after {d}?", "Which date comes {n} days after {d}?")
_TO_24: Final = ("Write {t} in 24-hour time.", "Convert {t} to 24-hour time.")
_TO_12: Final = ("Write {t} in 12-hour time.", "Convert {t} to 12-hour time.")
_MIXED: Final = (
    "How many minutes are {h} hours and {m} minutes?",
    "How many minutes are in {h} hours and {m} minutes?",
    "Convert {h} hours {m} minutes to minutes.",
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


def _hours_and_minutes(rng: random.Random) -> Draft:
    hours, minutes = rng.randint(2, 9), rng.randint(1, 59)
    question = rng.choice(_MIXED).format(h=hours, m=minutes)
    answer = str(60 * hours + minutes)
    return Draft(instance=("hours-minutes", hours, minutes), question=question, answer=answer)


def _cycle(
    rng: random.Random, names: tuple[str, ...], templates: tuple[str, ...], most: int
) -> Draft:
    """Step forwards or backwards through the days of the week or the months."""
    start, steps = rng.randrange(len(names)), rng.randint(2, most)
    way = rng.choice(("after", "after", "before"))
    end = start + steps if way == "after" else start - steps
    question = rng.choice(templates).format(n=steps, way=way, d=names[start])
    instance = (way, names[start], steps)
    return Draft(instance=instance, question=question, answer=names[end % len(names)])


def _clock(rng: random.Random) -> Draft:
    start, steps = 5 * rng.randrange(288), 5 * rng.randint(1, 12)
    way = rng.choice(("after", "after", "before"))
    end = (start + steps if way == "after" else start - steps) % 1440
    question = rng.choice(_CLOCK).format(n=steps, way=way, t=f"{start // 60}:{start % 60:02d}")
    answer = f"{end // 60}:{end % 60:02d}"
    return Draft(instance=("clock", way, start, steps), question=question, answer=answer)


def _twelve_hours(minute_of_day: int) -> str:
    hour, minute = divmod(minute_of_day, 60)
    return f"{(hour - 1) % 12 + 1}:{minute:02d} {'am' if hour < 12 else 'pm'}"


def _clock_notation(rng: random.Random) -> Draft:
    minute_of_day = rng.randrange(1440)
    twelve = _twelve_hours(minute_of_day)
    twenty_four = f"{minute_of_day // 60}:{minute_of_day % 60:02d}"
    if rng.random() < 0.6:
        question, answer = rng.choice(_TO_24).format(t=twelve), twenty_four
    else:
        question, answer = rng.choice(_TO_12).format(t=twenty_four), twelve
    return Draft(instance=("notation", minute_of_day), question=question, answer=answer)


def _written(date: datetime.date) -> str:
    return f"{_MONTHS[date.month - 1]} {date.day}"


def _date(rng: random.Random) -> Draft:
    start = datetime.date(2023, 1, 1) + datetime.timedelta(days=rng.randrange(365))
    steps = rng.randint(2, 20)
    question = rng.choice(_DATE).format(n=steps, d=_written(start))
    end = start + datetime.timedelta(days=steps)
    return Draft(
        instance=("date", start.month, start.day, steps), question=question, answer=_written(end)
    )


CONVERSION: Final = Domain(
    name="conversion",
    skills=(
        Skill(name="decimal_units", weight=2.5, draw=lambda rng: _units(rng, _DECIMAL_UNITS)),
        Skill(name="other_units", weight=2, draw=lambda rng: _units(rng, _OTHER_UNITS)),
        Skill(name="hours_and_minutes", weight=0.8, draw=_hours_and_minutes),
        Skill(name="weekday", weight=1.5, draw=lambda rng: _cycle(rng, _WEEKDAYS, _WEEKDAY, 20)),
        Skill(name="month", weight=1, draw=lambda rng: _cycle(rng, _MONTHS, _MONTH, 20)),
        Skill(name="clock", weight=1.5, draw=_clock),
        Skill(name="clock_notation", weight=1, draw=_clock_notation),
        Skill(name="date", weight=1, draw=_date),
    ),
)
