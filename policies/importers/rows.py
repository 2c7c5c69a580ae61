"""What importers share: rows of files, cells that say something, errors that name a line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from policies.errors import OutcomesError
from policies.json_text import UNREADABLE, read_json_text
from policies.kinds import explain

MORE: Final = "cells beyond the head's"
"""The key of what stands in a row of a CSV beyond its head."""
# What spreadsheets and data frames write where nothing is known.
_MISSING: Final = ("", "nan", "null", "none", "n/a")
csv.field_size_limit(2**31 - 1)  # whole documents stand in cells


class Rows:
    """The rows of a file of JSON Lines, or of a CSV; `number` is the line of the last one."""

    def __init__(self, file: Path) -> None:
        self.number = 0
        self._file = file

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._file.suffix.lower() == ".csv":
            with self._file.open(encoding="utf-8-sig", newline="") as table:
                self.number = 1
                reader = csv.DictReader(table, restkey=MORE)
                for row in reader:
                    self.number = reader.line_num
                    yield row
            return
        with self._file.open("rb") as lines:
            for self.number, line in enumerate(lines, start=1):
                if line.strip():
                    yield read_json_text(line)


def told_cells(row: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Return the cells of `names` that say something."""
    return {name: row[name].strip() for name in names if row[name].strip().lower() not in _MISSING}


def said_by(model: str, responses: Any) -> dict[str, str]:  # noqa: ANN401 - nested lists
    """Return what the model said by its name: the first text of its responses, if there is one."""
    while isinstance(responses, list) and responses:
        responses = responses[0]
    return {model: responses} if isinstance(responses, str) else {}


@contextmanager
def reading(file: Path, layout: str) -> Iterator[Rows]:
    """Give the rows of `file`; what goes wrong with one becomes an error that names its line."""
    rows = Rows(file)
    try:
        yield rows
    except OSError as error:
        raise OutcomesError(f"{file} cannot be read: {error.strerror}") from None
    except (*UNREADABLE, csv.Error) as error:
        raise OutcomesError(
            f"{file}, line {rows.number}: {why(error)}; expected {layout}"
        ) from None


def why(error: Exception) -> str:
    """Return what is wrong with a row, in words."""
    if isinstance(error, KeyError):
        return f"the key {error.args[0]!r} is missing"
    if isinstance(error, ValidationError):
        return explain(error)
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON: {error}"
    return str(error) if isinstance(error, OutcomesError) else f"{type(error).__name__}: {error}"
