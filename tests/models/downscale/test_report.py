"""The report is drawn from its figures alone, and needs no network."""

import json
import re
from html import escape
from pathlib import Path
from typing import Any

import pytest

from models.downscale.figures import share, training_footprint
from models.downscale.report import all_tables, write_report
from policies.pages import markdown

_DOMAINS = ["numbers", "words"]


def _system(name: str, kind: str, value: float, parameters: float) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "parameters": parameters,
        "usd_per_1000": 0.002,
        "accuracy": {"value": value, "interval_95": [value - 0.03, value + 0.03]},
        "by_domain": {d: share([True] * 6 + [False] * 4) for d in _DOMAINS},
        "right": "10",
    }


def _curve() -> dict[str, Any]:
    law = {"L0": 2.0, "a": 0.8, "b": 1.0}
    return {
        "num_members": [1, 2],
        "losses": [2.0, 1.6],
        "law": law,
        "intervals": {name: [value - 0.1, value + 0.1] for name, value in law.items()},
        "r2": 0.98,
    }


def _fitted(law: dict[str, float]) -> dict[str, Any]:
    intervals = {name: {"low": value - 1, "high": value + 1} for name, value in law.items()}
    return {"law": law, "intervals": intervals, "rmse": 0.1}


@pytest.fixture
def figures() -> dict[str, Any]:
    """What a small finished run would have collected."""
    mixture = {"A": 1.0, "B": 1.0, "C": 1.0, "E": 1.0, "alpha": 0.3, "beta": 0.2}
    pruning = dict.fromkeys(("Nc", "Dc", "E", "alpha", "beta", "gamma", "delta"), 0.1)
    training = {"tokens": 1000, "general_share": 0.1, "losses": [[10, 1.5]]}
    return {
        "pool": "<toy>",
        "domains": _DOMAINS,
        "num_test_questions": 20,
        "question_domains": dict.fromkeys(_DOMAINS, 10),
        "systems": [
            _system("base", "base", 0.8, 8e6),
            _system("numbers", "chunk", 0.4, 1e6),
            _system("routed (by domain)", "routed", 0.78, 1e6),
            _system("fused", "policy", 0.6, 8e6),
        ],
        "models": {
            "base": {"parameters": 8_000_000, "lineage": "the base"},
            "numbers": {
                "parameters": 1_000_000,
                "lineage": "cut",
                "training": training,
                "footprint": training_footprint(cpu_s=60, flops=1e12, device="cpu"),
            },
        },
        "losses": {"base": {"numbers": 0.3, "words": 0.4}, "numbers": {"numbers": 0.2}},
        "fits": {
            "curves": {
                f"{what}/{weighting}/{domain}": _curve()
                for what in ("loss", "error")
                for weighting in ("uniform", "evidence")
                for domain in (*_DOMAINS, "all")
            },
            "pruning": {
                **_fitted(pruning),
                "points": [
                    {"kept_share": 0.2, "base_parameters": 8e6, "tokens": t, "base_loss": 0.3,
                     "loss": 1.0}
                    for t in (1000, 2000)
                ],
            },
            "mixture": {
                "general_share": 0.1,
                "points": [
                    {"domain": "numbers", "general_share": s, "tokens": 1000, "domain_loss": 1.0,
                     "general_loss": 2.0}
                    for s in (0.0, 0.5)
                ],
                "domain": {**_fitted(mixture), "r2": 0.9},
                "general": {**_fitted(mixture), "r2": None},
            },
        },
        "selection": [
            {"domain": "numbers", "kept": 60, "of": 100, "switch": "hard",
             "trials": {"hard": 1.0, "easy": 1.1}}
        ],
    }  # fmt: skip


def test_the_report_is_one_file_with_its_plots_inside(
    figures: dict[str, Any], tmp_path: Path
) -> None:
    """Every plot is written and embedded; nothing is fetched; names are escaped."""
    write_report(json.loads(json.dumps(figures)), tmp_path)
    page = (tmp_path / "report.html").read_text()
    plots = {file.stem for file in (tmp_path / "plots").iterdir()}
    assert plots == {
        "quality-compute", "accuracy", "loss", "fused-loss", "fused-error", "mixture",
        "post-pruning",
    }  # fmt: skip
    assert page.count('src="data:image/png;base64,') == len(plots)
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "Pool &lt;toy&gt;" in page
    for table in all_tables(figures):
        assert escape(table.title) in page


def test_what_was_not_measured_is_left_out(figures: dict[str, Any], tmp_path: Path) -> None:
    """Without short runs their plots and rows are missing, and nothing else."""
    figures["fits"] |= {"mixture": None, "pruning": None}
    write_report(figures, tmp_path)
    plots = {file.stem for file in (tmp_path / "plots").iterdir()}
    assert plots == {"quality-compute", "accuracy", "loss", "fused-loss", "fused-error"}


def test_the_first_table_says_what_each_way_of_answering_is_worth(figures: dict[str, Any]) -> None:
    """Every system with its size, price and accuracy, as HTML and Markdown alike."""
    [first, *_] = all_tables(figures)
    assert first.rows[0][:4] == ("base", "8.00 M", "0.00200", "80.0% [77.0, 83.0]")
    assert "| base | 8.00 M |" in markdown(first)
