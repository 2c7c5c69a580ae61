"""Settings that refuse what they do not know, and what pydantic refused, in sentences."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from policies.errors import PolicyError

# What such keys hold is not shown: an address may have a password in it.
_SECRET = re.compile("url|token|secret|password")
# Sums of so many rows as anybody keeps then fit 64 bits, in which databases and engines count.
MOST_COUNT = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=MOST_COUNT)]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8


class Settings(BaseModel):
    """Settings as a file or a request gives them: no unknown keys, no conversions, finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def explain(error: ValidationError) -> str:
    """Return a pydantic error as sentences that name the key, the value and what is allowed."""
    lines = []
    for detail in error.errors(include_url=False):
        where = ".".join(str(part) for part in detail["loc"]) or "the file"
        if detail["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key")
        elif detail["type"] == "missing":
            lines.append(f"{where}: the key is missing")
        elif _SECRET.search(where):
            lines.append(f"{where}: {detail['msg']}")
        else:
            lines.append(f"{where}: {detail['msg']}, got {detail['input']!r}")
    return "; ".join(lines)


def first_problem(error: ValidationError, *, where: str, keys: Iterable[str]) -> str:
    """Return what is wrong first with the object at `where`, whose `keys` are allowed.

    Names the key, the value and what is allowed. A `PolicyError` from inside speaks for itself.
    """
    detail = error.errors(include_url=False)[0]
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, PolicyError):
        return str(cause)
    *above, key = detail["loc"] or ("",)
    parent = ".".join((where, *map(str, above)))
    if detail["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{parent}: the key {key!r} is missing"
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        allowed = "" if above else f"; allowed are {', '.join(keys)}"
        return f"{parent}: the key {short(key)} is unknown{allowed}"
    told = detail["msg"].replace("Input should", "it should").replace("valid tuple", "list")
    return f"{parent}.{key}: {short(detail['input'])} is refused: {told}"


def short(value: object) -> str:
    """Return `value` as an error shows it, cut short where it is long."""
    return _SHORT.repr(value)
