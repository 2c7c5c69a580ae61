"""Task domains with exactly checkable short answers: data for training, routing and evaluation.

A new domain is one file and one line here.
"""

from typing import Final

from models.tasks.base import Domain
from models.tasks.code import CODE
from models.tasks.dates import DATES
from models.tasks.numbers import ARITHMETIC, CONVERSION, NUMERALS, STORIES
from models.tasks.text import LISTS, TEXT

DOMAINS: Final[dict[str, Domain]] = {
    domain.name: domain
    for domain in (ARITHMETIC, STORIES, CONVERSION, NUMERALS, DATES, TEXT, LISTS, CODE)
}


def domain(name: str) -> Domain:
    """The domain called `name`.

    Raises:
        ValueError: no domain has this name.
    """
    if name not in DOMAINS:
        raise ValueError(f"unknown task domain {name!r}; known: {', '.join(DOMAINS)}")
    return DOMAINS[name]
