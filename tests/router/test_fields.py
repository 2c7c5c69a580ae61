"""Every field is honoured or refused by name, and docs/api.md says so."""

import re
from pathlib import Path
from typing import Any

import pytest

from models.engines.llamacpp import REFUSES as LLAMACPP_REFUSES
from models.engines.requests import OPTIONAL
from router.openai_api import chat, completions, fields

DOCS = (Path(__file__).parents[2] / "docs" / "api.md").read_text()


def _table(heading: str) -> dict[str, list[str]]:
    """Return the rows of the table under `heading`: cells by the field in the first one."""
    section = DOCS.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", section, re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


@pytest.mark.parametrize(
    ("column", "schema", "refused"),
    [
        (0, chat.ChatFields, chat.REFUSED),
        (1, completions.CompletionFields, completions.REFUSED),
    ],
)
def test_the_table_is_the_code(column: int, schema: Any, refused: dict[str, Any]) -> None:
    """The schema's fields are "yes", the refused ones "400", and there is no other."""
    told = {name: cells[column] for name, cells in _table("Fields").items() if cells[column]}
    assert {name for name, cell in told.items() if cell == "yes"} == set(schema.model_fields)
    refused_names = {*fields.REFUSED, *refused} - set(schema.model_fields)
    assert {name for name, cell in told.items() if cell == "400"} == refused_names


def test_the_engines_table_is_the_code() -> None:
    """What an engine refuses is "400" in its column, all else "yes"."""
    told = _table("Engines")
    assert set(told) == set(OPTIONAL)
    columns = [frozenset[str](), LLAMACPP_REFUSES, frozenset[str](), frozenset[str]()]
    for name, cells in told.items():
        assert cells == ["400" if name in refuses else "yes" for refuses in columns], name


# A value of each refused field that asks for something.
ASKS: dict[str, Any] = {
    "length_penalty": 2.0,
    "service_tier": "flex",
    "echo": True,
    "stream_interval": 2,
}


@pytest.mark.parametrize("name", sorted({*fields.REFUSED, *chat.REFUSED}))
def test_refused_fields_are_named(server: Any, name: str) -> None:
    """400 with the field's name where it asks for something, and 200 where it is null."""
    harmless = chat.REFUSED.get(name, fields.REFUSED.get(name, ()))
    value = ASKS.get(name, harmless != (True,))
    response = server.post(**{name: value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)
    assert server.post(**{name: None}).status_code == 200
