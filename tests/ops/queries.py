"""The expressions of dashboards and rules, and the metrics that they name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "helm" / "shoal"
DASHBOARDS = sorted((CHART / "dashboards").glob("*.json"))
RULES = sorted((CHART / "rules").glob("*.yaml"))

# Grafana's variables as a person would find them with everything selected.
_VARIABLES = {
    "$__rate_interval": "60s",
    "$__range": "5m",
    **dict.fromkeys(("$job", "$experiment", "$metric"), ".*"),
}


@dataclass(frozen=True, kw_only=True)
class PanelQuery:
    """One query of one panel, its variables filled in.

    `if_empty` is what the panel says where the query finds nothing.
    """

    dashboard: str
    panel: str
    expression: str
    if_empty: str | None


def load(file: Path) -> dict[str, Any]:
    """Return a dashboard."""
    return dict(json.loads(file.read_text()))


def panels(file: Path) -> list[dict[str, Any]]:
    """Return a dashboard's panels that show something."""
    return [panel for panel in load(file)["panels"] if panel["type"] != "row"]


def panel_queries() -> Iterator[PanelQuery]:
    """Yield every query of every dashboard."""
    for file in DASHBOARDS:
        for panel in panels(file):
            for target in panel["targets"]:
                expression = target["expr"]
                for name, value in _VARIABLES.items():
                    expression = expression.replace(name, value)
                yield PanelQuery(
                    dashboard=file.stem,
                    panel=panel["title"],
                    expression=expression,
                    if_empty=panel["fieldConfig"]["defaults"].get("noValue"),
                )


def rules() -> list[dict[str, Any]]:
    """Return every recording and alert rule."""
    groups = [group for file in RULES for group in yaml.safe_load(file.read_text())["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def metrics(expression: str) -> set[str]:
    """Return the metrics that an expression names."""
    return set(re.findall(r"\bshoal[_:][a-z0-9_:]+", re.sub(r'"[^"]*"', "", expression)))
