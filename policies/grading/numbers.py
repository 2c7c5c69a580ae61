"""The grader that compares each answer's number with the question's references."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Final

from policies.errors import PolicyError
from policies.grading.base import Question, Ungradable
from policies.grading.texts import SIGN, Compare, each_alone

# What one of each is in the unit that it is compared in.
_UNITS: Final[dict[str, tuple[str, float]]] = {
    name: (kind, size)
    for kind, units in {
        "m": {
            "mm millimeter millimetre": 1e-3,
            "cm centimeter centimetre": 1e-2,
            "m meter metre": 1,
            "km kilometer kilometre": 1e3,
            "in inch inches": 0.0254,
            "ft foot feet": 0.3048,
            "mi mile": 1609.344,
        },
        "g": {
            "mg milligram": 1e-3,
            "g gram": 1,
            "kg kilogram kilo": 1e3,
            "t tonne": 1e6,
            "oz ounce": 28.349523125,
            "lb lbs pound": 453.59237,
        },
        "s": {
            "ms millisecond": 1e-3,
            "s sec second": 1,
            "min minute": 60,
            "h hr hrs hour": 3600,
            "d day": 86400,
        },
        "l": {
            "ml milliliter millilitre": 1e-3,
            "cl centiliter centilitre": 1e-2,
            "l liter litre": 1,
        },
        "": {"%": 0.01},
    }.items()
    for names, size in units.items()
    for word in names.split()
    for name in ([word, f"{word}s"] if len(word) > 3 else [word])
}
_LARGE: Final = {"thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
# A sign that follows a figure or a letter joins two things, as in 2010-2015.
_NUMBER = re.compile(
    r"(?:(?<!\w)[-+−–])?(?:\d[\d,]*\.?\d*|\.\d+)(?:e[-+]?\d+)?"
    rf"(?P<below>(?:\s?/\s?\d+(?:\.\d+)?)*)(?:\s(?P<large>{'|'.join(_LARGE)})\b)?"
    r"(?:\s?(?P<unit>%|[a-z]+))?",
    re.I,
)
# Powers of ten as people and LaTeX write them, with figures or signs for the exponent.
_POWER: Final = re.compile(
    r"(?<=\d)\s?(?:[×x*·]|\\times|\\cdot)\s?10"
    r"(?:\^\{?(?P<power>[-+−–]?\d{1,3})\}?|(?P<raised>[⁻⁺]?[⁰¹²³⁴-⁹]{1,3}))"
)
# What stands between thousands beside the comma: blanks that do not break, apostrophes.
_THOUSANDS: Final = re.compile(r"(?<![\d.,])(\d{1,3})((?:[\u00a0\u2009\u202f'’]\d{3})+)(?!\d)")


# Fractions as LaTeX has them and as one sign; a whole number may stand before either.
_FRACTION: Final = re.compile(
    r"(?P<whole>\d)?(?:\\[dt]?frac\{(?P<above>\d+)\}\{(?P<below>\d+)\}"
    r"|(?P<sign>[\u00bc-\u00be\u2150-\u215e]))"
)
_MIXED: Final = re.compile(r"(?<![\d.,/])(\d{1,9})\s+(\d{1,9})\s?/\s?(\d{1,9})(?![\d.]|\s?/)")


def numeric(argument: str) -> Compare:
    """1 where the answer's last number, or fraction, is a reference's, within a relative tolerance.

    The argument is the tolerance (default 1e-6). Units of length, mass, time and volume, and
    percentages, are converted where both sides name one; a side without a unit means the other's.
    """
    try:
        tolerance = float(argument or 1e-6)
    except ValueError:
        raise PolicyError(f"grade: numeric:{argument}: the tolerance is not a number") from None
    if not 0 <= tolerance < 1:
        raise PolicyError(f"grade: numeric:{argument}: the tolerance is not in [0, 1)")

    def compare(question: Question, answer: str) -> float:
        found = _last_number(answer)
        wanted = [_last_number(right) for right in question.right()]
        if None in wanted:
            raise Ungradable(f"no number in the reference {question.references!r}")
        return float(any(found and right and _same(found, right, tolerance) for right in wanted))

    return compare


def _last_number(text: str) -> tuple[float, str] | None:
    """Return the last number of `text` and its unit, empty where it has none that is known."""
    last = None
    text = _THOUSANDS.sub(lambda found: re.sub(r"\D", "", found[0]), text)
    text = _POWER.sub(_exponent, _MIXED.sub(_whole_and_part, _FRACTION.sub(_in_figures, text)))
    for match in _NUMBER.finditer(text):
        unit, below = (match["unit"] or "").lower(), match["below"].split("/")[1:]
        digits = text[match.start() : match.start("below")]
        value = float(re.sub(SIGN, "-", digits.replace(",", "")))
        if len(below) == 1 and float(below[0]):
            value /= float(below[0])
        elif below:  # a date, say
            value = float(below[-1])
        value *= _LARGE.get((match["large"] or "").lower(), 1)
        if math.isfinite(value):
            last = value, unit if unit in _UNITS else ""
    return last


def _in_figures(fraction: re.Match[str]) -> str:
    sign = unicodedata.normalize("NFKC", fraction["sign"] or "").replace("\N{FRACTION SLASH}", "/")
    figures = sign or f"{fraction['above']}/{fraction['below']}"
    return f"{fraction['whole']} {figures}" if fraction["whole"] else figures


def _exponent(power: re.Match[str]) -> str:
    told = unicodedata.normalize("NFKC", power["power"] or power["raised"])
    return "e" + re.sub(SIGN, "-", told)


def _whole_and_part(mixed: re.Match[str]) -> str:
    whole, above, below = (int(digits) for digits in mixed.groups())
    return str(whole + above / below) if above < below else mixed[0]


def _same(one: tuple[float, str], other: tuple[float, str], tolerance: float) -> bool:
    (a, unit_a), (b, unit_b) = one, other
    if unit_a and unit_b:
        (kind_a, size_a), (kind_b, size_b) = _UNITS[unit_a], _UNITS[unit_b]
        return kind_a == kind_b and math.isclose(a * size_a, b * size_b, rel_tol=tolerance)
    return math.isclose(a, b, rel_tol=tolerance)


NUMERIC = each_alone(numeric)
