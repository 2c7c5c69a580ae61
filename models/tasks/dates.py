"""Clock times, weekdays, months and dates.

Clock times use 24 hours unless am or pm is written. Date sums stay within their month.
"""

import datetime
import random
from typing import Final

from models.tasks.base import Domain, Draft, Skill

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
_TO_ISO: Final = ("Write {d} as an ISO date.", "Convert {d} to an ISO date.")


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


def clock(rng: random.Random) -> Draft:
    """The time some minutes before or after another."""
    start, steps = 5 * rng.randrange(288), rng.choice((10, 15, 20, 30, 45))
    way = rng.choice(("after", "after", "before"))
    end = (start + steps if way == "after" else start - steps) % 1440
    question = rng.choice(_CLOCK).format(n=steps, way=way, t=f"{start // 60}:{start % 60:02d}")
    answer = f"{end // 60}:{end % 60:02d}"
    return Draft(instance=("clock", way, start, steps), question=question, answer=answer)


def _twelve_hours(minute_of_day: int) -> str:
    hour, minute = divmod(minute_of_day, 60)
    return f"{(hour - 1) % 12 + 1}:{minute:02d} {'am' if hour < 12 else 'pm'}"


def clock_notation(rng: random.Random) -> Draft:
    """A time with am or pm to 24 hours or back."""
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


def date(rng: random.Random) -> Draft:
    """A date some days after another in the same month."""
    start = datetime.date(2023, rng.randint(1, 12), rng.randint(1, 22))
    steps = rng.randint(2, 6)
    question = rng.choice(_DATE).format(n=steps, d=_written(start))
    end = start + datetime.timedelta(days=steps)
    return Draft(
        instance=("date", start.month, start.day, steps), question=question, answer=_written(end)
    )


def date_notation(rng: random.Random) -> Draft:
    """A date with its month's name to ISO 8601 or back."""
    day = datetime.date(1950, 1, 1) + datetime.timedelta(days=rng.randrange(36_500))
    written = f"{_written(day)}, {day.year}"
    if rng.random() < 0.6:
        question, answer = rng.choice(_TO_ISO).format(d=written), day.isoformat()
    else:
        question, answer = f"What date is {day.isoformat()}?", written
    return Draft(instance=("iso", day.isoformat()), question=question, answer=answer)


def weekday(rng: random.Random) -> Draft:
    """The day of the week up to a week before or after another."""
    return _cycle(rng, _WEEKDAYS, _WEEKDAY, 7)


def month(rng: random.Random) -> Draft:
    """The month up to a year before or after another."""
    return _cycle(rng, _MONTHS, _MONTH, 12)


DATES: Final = Domain(
    name="dates",
    skills=(
        Skill(name="clock_notation", weight=1.2, draw=clock_notation),
        Skill(name="date_notation", weight=1.2, draw=date_notation),
        Skill(name="clock", weight=0.8, draw=clock),
        Skill(name="date", weight=0.6, draw=date),
        Skill(name="weekday", weight=0.5, draw=weekday),
        Skill(name="month", weight=0.4, draw=month),
    ),
)
