"""The report is drawn from its figures alone, and needs no network."""

import json
import re
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.downscale.figures import share
from models.downscale.footprint import training_footprint
from models.downscale.report import markdown, write_report
from models.downscale.tables import all_tables

_DOMAINS = ["numbers", "words"]


def _system(name: str, kind: str, value: float, parameters: float) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "parameters": parameters,
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
    claim = {"system": "routed", "reference": "base", "interval_95": [0.9, 1.0], "bound": 0.95}
    mixture = {"A": 1.0, "B": 1.0, "C": 1.0, "E": 1.0, "alpha": 0.3, "beta": 0.2}
    pruning = dict.fromkeys(("Nc", "Dc", "E", "alpha", "beta", "gamma", "delta"), 0.1)
    training = {"tokens": 1000, "general_share": 0.1, "losses": [[10, 1.5]]}
    return {
        "pool": "<toy>",
        "domains": _DOMAINS,
        "num_test_questions": 20,
        "claims": [
            {"claim": "a", "value": 0.97, "holds": True, "surely": False, **claim},
            {"claim": "b", "value": -0.02, "holds": False, "surely": False, **claim},
            {"claim": "c", "value": 0.98, "holds": True, "surely": True, **claim},
        ],
        "systems": [
            _system("base", "base", 0.8, 8e6),
            _system("numbers", "chunk", 0.4, 1e6),
            _system("routed (by domain)", "routed", 0.78, 1e6),
            _system("fused-uniform", "fused", 0.6, 8e6),
            _system("merged (ties)", "merged", 0.3, 8e6),
            _system("from scratch (by domain)", "scratch", 0.5, 1e6),
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
            "proposition": {
                "num_members": 2,
                "base_loss": 0.3,
                "fused_loss": 0.4,
                "measured_fused_wins": False,
                "constants": {"a": 0.8, "b": 1.0, "gamma": 1.0, "delta": 0.3},
                "margin": -0.2,
                "smallest_winning_ensemble": None,
                "predicted_fused_wins": False,
                "agrees": True,
            },
        },
        "compression": {
            "removed_share": 0.5,
            "base_accuracy": 0.8,
            "rows": [
                {"what": "times faster", "on": "alone", "predicted": 1.3, "measured": 1.5,
                 "relative_error": -0.13}
            ],
        },
        "timings": [
            {"name": name, "num_layers": layers, "hidden_size": 8, "parameters": 10,
             "ms_per_token": layers / 2}
            for name, layers in (("base", 6), ("chunk", 3), ("2 x 16", 2))
        ],
        "selection": [
            {"domain": "numbers", "kept": 60, "of": 100, "switch": "hard",
             "trials": {"hard": 1.0, "easy": 1.1}}
        ],
        "variants": [
            {"comparison": comparison, "variant": variant, "domain": "numbers", "seed": 1,
             "tokens": tokens, "loss": 1.0}
            for comparison in ("selection", "pruning", "distillation")
            for variant in ("one", "other")
            for tokens in (0, 100)
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
        "quality-compute", "accuracy", "loss", "fused-loss", "fused-error", "selection",
        "pruning", "distillation", "mixture", "post-pruning", "latency",
    }  # fmt: skip
    assert page.count('src="data:image/png;base64,') == len(plots)
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "Pool &lt;toy&gt;" in page
    for table in all_tables(figures):
        assert escape(table.title) in page


def test_what_was_not_measured_is_left_out(figures: dict[str, Any], tmp_path: Path) -> None:
    """Without short runs and comparisons their plots and rows are missing, and nothing else."""
    figures["fits"] |= {"mixture": None, "pruning": None}
    del figures["fits"]["proposition"]["constants"]
    figures["variants"] = []
    write_report(figures, tmp_path)
    plots = {file.stem for file in (tmp_path / "plots").iterdir()}
    assert plots == {
        "quality-compute", "accuracy", "loss", "fused-loss", "fused-error", "latency"
    }  # fmt: skip


def test_claims_are_told_with_their_certainty(figures: dict[str, Any]) -> None:
    """A figure that meets its bound while its interval does not is "within error"."""
    [claims, *_] = all_tables(figures)
    assert [row[-1] for row in claims.rows] == ["yes, within error", "no", "yes"]
    assert claims.rows[0][3] == "97.0% [90.0, 100.0]"
    assert "| (a)" in markdown(claims)


def test_the_footprint_of_training_says_how_it_was_got() -> None:
    """On a CPU, one hour at the table's 3.97 W; on a GPU, from the FLOPs."""
    cpu = training_footprint(cpu_s=3600, flops=1e15, device="cpu")
    assert cpu["wh"] == pytest.approx(3.97)
    assert cpu["operational_gco2e"] == pytest.approx(3.97 * 0.4806, rel=1e-3)
    assert "measured" in cpu["method"]
    gpu = training_footprint(cpu_s=1, flops=1e18, device="cuda")
    assert "modelled from FLOPs" in gpu["method"]
    assert np.isfinite(gpu["wh"])
