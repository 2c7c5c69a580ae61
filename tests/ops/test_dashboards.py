"""The dashboards as files: complete, importable, and about metrics that there are."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from router.metrics.families import BY_NAME
from tests.ops.queries import DASHBOARDS, load, metrics, panel_queries, panels, rules

_SUFFIX = re.compile(r"_(bucket|sum|count)$")
UIDS = {
    "cost": "shoal-cost",
    "experiments": "shoal-experiments",
    "quality": "shoal-quality",
    "serving": "shoal-serving",
}


def family(metric: str) -> str:
    """Return the family that a metric of an expression belongs to."""
    base = _SUFFIX.sub("", metric)
    return base if base in BY_NAME and BY_NAME[base].kind == "histogram" else metric


def test_there_are_four_with_fixed_ids() -> None:
    """Links and bookmarks survive an upgrade."""
    assert {file.stem: load(file)["uid"] for file in DASHBOARDS} == UIDS


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_every_panel_explains_itself(file: Path) -> None:
    """A title, a description, a unit and thresholds; the data source is the reader's choice."""
    dashboard = load(file)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert {"datasource", "job"} <= variables
    assert len(panels(file)) >= 10
    for panel in panels(file):
        title, defaults = panel["title"], panel["fieldConfig"]["defaults"]
        assert len(panel["description"]) > 20, title
        assert defaults["unit"], title
        assert defaults["thresholds"]["steps"], title
        assert panel["targets"], title
        # An axis that ends hides what is above: only what cannot be may lie there.
        if "max" in defaults:
            assert defaults["unit"] == "percentunit" or title in {"Engines", "P-values"}, title
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, title
        for target in panel["targets"]:
            assert target["legendFormat"], title
            assert 'job=~"$job"' in target["expr"], title
    used = set(re.findall(r"\$(?!__)\{?(\w+)", json.dumps(dashboard)))
    assert used <= variables


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_panels_do_not_overlap(file: Path) -> None:
    """Every place of the grid of 24 columns belongs to one panel at most."""
    taken: set[tuple[int, int]] = set()
    for panel in load(file)["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in load(file)["panels"]]
    assert len(set(ids)) == len(ids)


def test_replicas_are_never_added_up() -> None:
    """Every metric of an expression first loses the labels that tell replicas apart."""
    for query in panel_queries():
        merged = re.findall(
            r"max without \(instance, pod, container\) \(|max by \(", query.expression
        )
        assert len(merged) >= len(re.findall(r"shoal_\w+\{", query.expression)), query


def test_they_show_metrics_that_there_are() -> None:
    """Dashboards and rules name what the code exposes or a rule records; most of it is used."""
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    expressions = [query.expression for query in panel_queries()]
    expressions += [rule["expr"] for rule in rules()]
    named = {family(name) for expression in expressions for name in metrics(expression)}
    assert named <= set(BY_NAME) | recorded
    shown = {family(name) for query in panel_queries() for name in metrics(query.expression)}
    left_out = set(BY_NAME) - shown
    # A share of each cap is shown instead; the circuit has an alert; the build is for `job`.
    assert {name for name in left_out if not name.startswith("shoal_budget_")} == {
        "shoal_build_info",
        "shoal_engine_circuit_open",
    }
