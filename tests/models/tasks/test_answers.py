"""Every domain's answers, worked out a second time by other means."""

import datetime
import re
from itertools import islice

import pytest

from models.tasks import DOMAINS
from models.tasks.base import Split, Task
from models.tasks.numbers import in_words

_MONTHS = [datetime.date(2023, m, 1).strftime("%B") for m in range(1, 13)]
_DAYS = [(datetime.date(2023, 1, 2) + datetime.timedelta(days=d)).strftime("%A") for d in range(7)]
_SYMBOLS = {
    "plus": "+",
    "minus": "-",
    "times": "*",
    "x": "*",
    "divided by": "//",
    "/": "//",
}


def _tasks(domain: str, *skills: str, count: int = 3000) -> list[Task]:
    drawn = islice(DOMAINS[domain].stream(Split.TRAIN, seed=11), count)
    found = [task for task in drawn if task.skill in skills]
    assert found
    return found


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def test_bare_arithmetic_evaluates_to_its_answer() -> None:
    """Operators written as signs or words give what Python's own arithmetic gives."""
    skills = ("add", "subtract", "multiply", "times_table", "divide", "add_three")
    checked = 0
    for task in _tasks("arithmetic", *skills):
        text = task.question
        for word, symbol in _SYMBOLS.items():
            text = text.replace(f" {word} ", f" {symbol} ")
        match = re.search(r"\d+(?: ?(?://|[-+*]) ?\d+)+", text)
        if match:
            assert str(eval(match.group())) == task.answer, task
            checked += 1
    assert checked > 800


@pytest.mark.parametrize(
    ("skill", "work_out"),
    [
        ("add_story", lambda a, b: a + b),
        ("subtract_story", lambda a, b: a - b),
        ("multiply_story", lambda a, b: a * b),
    ],
)
def test_word_problems(skill: str, work_out) -> None:  # type: ignore[no-untyped-def]
    """A word problem's two numbers, in their order, give its answer."""
    for task in _tasks("stories", skill):
        assert str(work_out(*_numbers(task.question))) == task.answer, task


def test_unit_conversions_keep_the_quantity() -> None:
    """Question and answer are the same quantity in base units."""
    size = {
        "km": 1000_000,
        "m": 1000,
        "meters": 1000,
        "cm": 10,
        "mm": 1,
        "kg": 1000,
        "g": 1,
        "liters": 1000,
        "ml": 1,
        "dollars": 100,
        "cents": 1,
        "seconds": 1,
        "minutes": 60,
        "hours": 3600,
        "days": 86400,
        "weeks": 7 * 86400,
        "years": 12,
        "months": 1,
        "feet": 12,
        "inches": 1,
    }
    for task in _tasks("conversion", "decimal_units", "other_units"):
        [number] = _numbers(task.question)
        named = [word for word in re.findall(r"[a-z]+", task.question) if word in size]
        unit = re.search(r"\d+ ([a-z]+)", task.question)
        assert unit
        source = unit.group(1)
        [target] = [word for word in named if word != source] or [source]
        assert number * size[source] == int(task.answer) * size[target], task


def test_mixed_units() -> None:
    """So many large units and so many small ones are the small ones answered."""
    factors = {"hours": 60, "dollars": 100, "meters": 100, "weeks": 7, "feet": 12}
    for task in _tasks("conversion", "mixed_units"):
        large, small = _numbers(task.question)
        [factor] = [f for unit, f in factors.items() if f" {unit} and" in task.question]
        assert sum([large] * factor) + small == int(task.answer), task


def test_number_words_are_all_different() -> None:
    """Words and digits belong to one another, one to one."""
    words: dict[str, int] = {}
    for task in _tasks("numerals", "number_words", count=20_000):
        match = re.search(
            r"(?:Write|write|is|Convert|convert) (?:the number )?(.*?) (?:in|to)", task.question
        )
        assert match
        number, text = sorted((match.group(1), task.answer))
        assert words.setdefault(text, int(number)) == int(number), task
    assert in_words(347) == "three hundred forty-seven"
    assert in_words(12) == "twelve"
    assert in_words(600) == "six hundred"
    assert len(words) == len(set(words.values())) > 500


def test_roman_numerals() -> None:
    """Subtracting a letter before a larger one and adding the others gives the number."""
    value = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}
    for task in _tasks("numerals", "roman_numerals"):
        [numeral] = re.findall(r"\b[IVXLC]+\b", f"{task.question} {task.answer}")
        [number] = _numbers(f"{task.question} {task.answer}")
        letters = [value[letter] for letter in numeral]
        after = [*letters[1:], 0]
        signed = [-a if a < b else a for a, b in zip(letters, after, strict=True)]
        assert sum(signed) == number, task
        assert not re.search(r"(.)\1{3}", numeral)


def test_iso_dates() -> None:
    """strptime reads both writings of a date as the same day."""
    for task in _tasks("dates", "date_notation"):
        text = f"{task.question} {task.answer}"
        iso, written = re.search(r"\d{4}-\d\d-\d\d", text), re.search(r"[A-Z]\w+ \d+, \d{4}", text)
        assert iso
        assert written
        day = datetime.datetime.strptime(written.group(), "%B %d, %Y").date()
        assert day.isoformat() == iso.group(), task


@pytest.mark.parametrize(("skill", "names"), [("weekday", _DAYS), ("month", _MONTHS)])
def test_weekdays_and_months(skill: str, names: list[str]) -> None:
    """Walking the calendar step by step ends at the answer."""
    for task in _tasks("dates", skill):
        [steps] = _numbers(task.question)
        place = next(i for i, name in enumerate(names) if name in task.question)
        for _ in range(steps):
            place = (place + (-1 if "before" in task.question else 1)) % len(names)
        assert names[place] == task.answer, task


def test_clock_arithmetic() -> None:
    """The datetime module agrees on the time so many minutes before or after."""
    for task in _tasks("dates", "clock"):
        steps, hour, minute = _numbers(task.question)
        sign = -1 if "before" in task.question else 1
        start = datetime.datetime(2023, 5, 5, hour, minute, tzinfo=datetime.UTC)
        end = start + sign * datetime.timedelta(minutes=steps)
        assert f"{end.hour}:{end.minute:02d}" == task.answer, task


def test_clock_notation() -> None:
    """strptime reads the 12-hour and the 24-hour writing as the same time."""
    for task in _tasks("dates", "clock_notation"):
        written = re.search(r"\d+:\d\d(?: [ap]m)?", task.question)
        assert written
        times = []
        for text in (written.group(), task.answer):
            form = "%I:%M %p" if text.endswith("m") else "%H:%M"
            times.append(datetime.datetime.strptime(text, form).replace(tzinfo=datetime.UTC))
        assert times[0] == times[1], task


def test_dates() -> None:
    """The datetime module agrees on the date so many days after."""
    for task in _tasks("dates", "date"):
        steps, day = _numbers(task.question)
        month = next(i for i, name in enumerate(_MONTHS, 1) if name in task.question)
        end = datetime.date(2023, month, day) + datetime.timedelta(days=steps)
        assert f"{_MONTHS[end.month - 1]} {end.day}" == task.answer, task


def test_code_answers_are_what_python_prints() -> None:
    """The expression found in the question evaluates to the answer."""
    frames = (
        r"What does print\((.*)\) show\??",
        r"What does (.*) (?:give in Python|return)\??",
        r"What is the value of (.*?)\??",
        r"Evaluate the Python expression (.*?)\.?",
        r"Evaluate (.*?)\.?",
        r"In Python, what is (.*?)\??",
        r"What is (.*?)\??",
        r"print\((.*)\)",
        r"(.*)",
    )
    skills = [s.name for s in DOMAINS["code"].skills if s.name != "assignment"]
    for task in _tasks("code", *skills):
        matches = (re.fullmatch(frame, task.question, re.IGNORECASE) for frame in frames)
        expression = next(match.group(1) for match in matches if match)
        assert str(eval(expression)) == task.answer, task


def test_assignments() -> None:
    """Running the two assignments and the expression gives the answer."""
    for task in _tasks("code", "assignment"):
        x, y = re.findall(r"[xy] = (\d+)", task.question)
        match = re.search(r"(?:what is|print\() ?(.*?)(?:\?|$|\)$)", task.question)
        assert match
        text = match.group(1)
        text += ")" if text.count("(") > text.count(")") else ""
        assert str(eval(text, {"x": int(x), "y": int(y)})) == task.answer, task


# The words that the text domain's templates are made of, so that what is left is the instance.
_FRAME = re.findall(
    r"\w+",
    "reverse the word what is spelled backwards spell write in upper case capital letters "
    "uppercase put capitals with hyphens a hyphen between how many are does have count long "
    "first last two of letter which comes give s second third fourth fifth sixth",
)


def _word(task: Task) -> str:
    quoted = re.search(r"['\"](\w+)['\"]", task.question)
    if quoted:
        return quoted.group(1)
    words = re.findall(r"[a-z]+", re.sub(r"\d(st|nd|rd|th)", "", task.question.lower()))
    made_up = [w for w in words if w not in _FRAME]
    # A made-up word may happen to be one of the frame's ("have"); it then stands last.
    [word] = made_up or words[-1:]
    return str(word)


@pytest.mark.parametrize(
    ("skill", "work_out"),
    [
        ("reverse", lambda w: "".join(reversed(w))),
        ("upper", str.upper),
        ("hyphens", lambda w: "-".join(list(w))),
        ("count_letters", lambda w: str(len(list(w)))),
    ],
)
def test_whole_word_questions(skill: str, work_out) -> None:  # type: ignore[no-untyped-def]
    """String methods agree with the answer about the word in the question."""
    for task in _tasks("text", skill, count=1500):
        assert work_out(_word(task)) == task.answer, task


def test_letters_of_words() -> None:
    """The letter at the named place is the answer."""
    places = {"first": 0, "1st": 0, "second": 1, "2nd": 1, "third": 2, "3rd": 2, "fourth": 3}
    places |= {"4th": 3, "fifth": 4, "5th": 4, "sixth": 5, "6th": 5, "last": -1}
    for task in _tasks("text", "letter"):
        [place] = [p for name, p in places.items() if f" {name} " in task.question]
        assert _word(task)[place] == task.answer, task


def test_lists_of_numbers() -> None:
    """Sorting, reversing and picking from the numbers in the question gives the answer."""
    for task in _tasks("lists", "sort", "reverse_list", "pick"):
        numbers, text = _numbers(task.question), task.question.lower()
        if task.skill == "sort":
            falling = "descending" in text or "largest to" in text
            wanted = sorted(numbers, reverse=falling)
        elif task.skill == "reverse_list":
            wanted = list(reversed(numbers))
        elif "how many" in text or "count" in text:
            wanted = [len(numbers)]
        else:
            ordered = sorted(numbers)
            by_word = {"largest": ordered[-1], "biggest": ordered[-1], "smallest": ordered[0]}
            by_word |= {"last": numbers[-1], "first": numbers[0], "second": numbers[1]}
            wanted = [value for word, value in by_word.items() if f" {word}" in text]
        assert ", ".join(map(str, wanted)) == task.answer, task
