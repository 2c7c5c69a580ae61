"""Figures of other runs beside this run's."""

import json
from pathlib import Path
from typing import Any

import pytest

from models.downscale.errors import RecipeError
from models.downscale.figures import _compared

_DOMAIN_Q = ["a", "a", "b"]


def _results(path: Path, **changes: Any) -> str:
    systems = [
        {"name": name, "kind": kind, "parameters": 5.0, "right": "101"}
        for name, kind in (("base", "base"), ("finetuned", "base"), ("a", "chunk"))
    ]
    content = {"question_domains": {"a": 2, "b": 1}, "systems": systems, **changes}
    path.write_text(json.dumps(content))
    return str(path)


def test_another_runs_systems_come_with_its_label(tmp_path: Path) -> None:
    """All but the shared base and the single chunks, question by question."""
    found = _compared({"strict": _results(tmp_path / "results.json")}, _DOMAIN_Q)
    assert list(found) == ["strict: finetuned"]
    assert found["strict: finetuned"].right_Q.tolist() == [1.0, 0.0, 1.0]


def test_results_on_other_questions_are_refused(tmp_path: Path) -> None:
    """They could not be compared in pairs."""
    file = _results(tmp_path / "results.json", question_domains={"a": 3})
    with pytest.raises(RecipeError, match=r"compare\.strict: .*measured on other questions"):
        _compared({"strict": file}, _DOMAIN_Q)
    with pytest.raises(RecipeError, match=r"compare\.strict: .*holds no results"):
        _compared({"strict": str(tmp_path / "missing.json")}, _DOMAIN_Q)
