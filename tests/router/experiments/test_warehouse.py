"""What a warehouse reads: the views, over the files, give the report's own figures."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from policies.experiments.analysis import analyse, arm_names
from policies.experiments.effects import Observation, Observations
from policies.experiments.experiment import Arm, Experiment
from policies.experiments.metrics import OwnMetric
from router.experiments.reporting import Summary
from router.experiments.warehouse import EXPOSURES, FACTS, VIEWS, export_experiment


def test_the_views_say_what_the_report_says(tmp_path: Path) -> None:
    """Means per arm in SQL equal the report's, with own metrics and values that are missing.

    A metric of one's own may be called by a word of SQL.
    """
    experiment = Experiment(
        name="race",
        arms=tuple(Arm(name=name, policy="auto", weight=0.5) for name in ("old", "new")),
        metrics={
            "refund": OwnMetric(direction="decrease"),
            "order": OwnMetric(direction="increase"),
        },
    )
    rng = np.random.default_rng(31)
    rows = [
        Observation(
            unit=f"u{n % 40}", arm=("old", "new")[n % 2], propensity=0.5, time_s=1e9 + n,
            values={
                "usd": float(rng.random()), "refund": float(n % 3) if n % 5 else None,
                "order": float(n % 7),
            },
        )
        for n in range(200)
    ]  # fmt: skip
    seen = Observations.from_rows(rows, arms=arm_names(experiment))
    report = analyse(experiment, seen)
    summary = Summary(
        experiment=experiment, status="running", state=None, observations=seen, report=report
    )
    assert export_experiment(summary, tmp_path) == 200

    warehouse = sqlite3.connect(":memory:")
    for file in (EXPOSURES, FACTS):
        table = pq.read_table(tmp_path / file)
        marks = ", ".join("?" for _ in table.column_names)
        quoted = ", ".join(f'"{name}"' for name in table.column_names)
        warehouse.execute(f"CREATE TABLE {Path(file).stem} ({quoted})")
        warehouse.executemany(
            f"INSERT INTO {Path(file).stem} VALUES ({marks})",
            [tuple(map(_plain, row.values())) for row in table.to_pylist()],
        )
    warehouse.executescript((tmp_path / VIEWS).read_text())
    assigned = warehouse.execute(
        "SELECT variation_id, COUNT(*), COUNT(DISTINCT unit) FROM experiment_assignments "
        "WHERE experiment_id = 'race' GROUP BY variation_id"
    ).fetchall()
    assert {name: (count, units) for name, count, units in assigned} == {
        "old": (20, 20), "new": (20, 20),
    }  # fmt: skip
    for arm in report.arms:
        for metric in ("usd", "refund", "order"):
            [(mean,)] = warehouse.execute(
                f"SELECT SUM({metric}_sum) / SUM({metric}_count) FROM metrics_by_unit "
                "WHERE variation_id = ?",
                (arm.name,),
            ).fetchall()
            assert mean == pytest.approx(arm.means[metric].mean)


def _plain(value: object) -> object:
    return value.isoformat() if hasattr(value, "isoformat") else value
