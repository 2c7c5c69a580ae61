"""An experiment's assignments and metrics as files that GrowthBook and dbt-style warehouses read.

Two Parquet tables and the SQL of views over them, in plain SQL that DuckDB, PostgreSQL, SQLite and
the large warehouses understand (names of one's own metrics are in double quotes: they may be words
of SQL, and where a warehouse wants backticks it gets them by hand):

- `shoal_exposures`: each randomised unit once, with the arm and the time of its first request;
- `shoal_facts`: each request, with its unit, time and one column per metric (null: not known).

The views have the columns that GrowthBook asks for: `experiment_assignments` is its experiment
assignment query (unit, timestamp, experiment_id, variation_id), `metric_facts` the source of its
fact metrics, and `metrics_by_unit` one row per unit, as a dbt model would sum them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from policies.experiments.effects import Observations
from policies.experiments.experiment import Experiment
from policies.experiments.metrics import COVARIATES, METRICS
from policies.files import replacing, write_atomic
from router.experiments.reporting import Summary
from router.ledger import LedgerError

EXPOSURES, FACTS, VIEWS = "shoal_exposures.parquet", "shoal_facts.parquet", "views.sql"


def export_experiment(summary: Summary, folder: Path) -> int:
    """Write the tables and the views into `folder`; return the number of requests.

    Raises `LedgerError` without pyarrow.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415 (an extra)
        import pyarrow.parquet as pq  # noqa: PLC0415
    except ImportError:
        raise LedgerError(
            "export: Parquet needs the package pyarrow: pip install 'shoal[parquet]'"
        ) from None
    experiment, seen = summary.experiment, summary.observations
    names = columns_of(experiment)
    text, number = pa.string(), pa.float64()
    stamp = pa.timestamp("us", tz="UTC")
    exposure = [("unit", text), ("timestamp", stamp), ("experiment_id", text),
                ("variation_id", text), ("propensity", number)]  # fmt: skip
    fact = [("unit", text), ("timestamp", stamp), *((name, number) for name in names)]
    folder.mkdir(parents=True, exist_ok=True)
    for file, columns, rows in (
        (EXPOSURES, exposure, list(exposures(experiment, seen))),
        (FACTS, fact, list(facts(seen, names))),
    ):
        with replacing(folder / file) as temporary:
            pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(columns)), temporary)
    write_atomic(folder / VIEWS, views(names).encode())
    return len(seen)


def columns_of(experiment: Experiment) -> list[str]:
    """Return the columns of metrics: those that requests have; others are made of them."""
    names = [*METRICS, *experiment.metrics]
    made = [name for name in names if name == "judged_quality" or experiment.is_ratio(name)]
    return [*(name for name in names if name not in made), *COVARIATES]


def exposures(experiment: Experiment, seen: Observations) -> Iterator[dict[str, Any]]:
    """Yield each unit's first request."""
    for index in seen.first_indices():
        yield {
            "unit": seen.units[seen.unit[index]],
            "timestamp": _time(seen.time_s[index]),
            "experiment_id": experiment.name,
            "variation_id": seen.arms[seen.arm[index]],
            "propensity": float(seen.propensity[index]),
        }


def facts(seen: Observations, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield each request's metrics."""
    for index in range(len(seen)):
        values = {name: float(seen.columns[name][index]) for name in names if name in seen.columns}
        yield {
            "unit": seen.units[seen.unit[index]],
            "timestamp": _time(seen.time_s[index]),
            **{name: value for name, value in values.items() if not math.isnan(value)},
        }


def views(names: Sequence[str]) -> str:
    """Return the SQL of the views."""
    plain = (*METRICS, *COVARIATES)
    sums = ",\n".join(
        f"  SUM(f.{quote}{name}{quote}) AS {quote}{name}_sum{quote},\n"
        f"  COUNT(f.{quote}{name}{quote}) AS {quote}{name}_count{quote}"
        for name, quote in ((name, "" if name in plain else '"') for name in names)
    )
    return f"""-- Load the Parquet files as the tables shoal_exposures and shoal_facts; in DuckDB:
--   CREATE TABLE shoal_exposures AS SELECT * FROM 'shoal_exposures.parquet';
--   CREATE TABLE shoal_facts AS SELECT * FROM 'shoal_facts.parquet';

-- GrowthBook: experiment assignment query, identifier type "unit"; variation ids are arms' names.
CREATE VIEW experiment_assignments AS
SELECT unit, timestamp, experiment_id, variation_id FROM shoal_exposures;

-- GrowthBook: fact table; its metrics are sums, means and ratios of these columns.
CREATE VIEW metric_facts AS
SELECT * FROM shoal_facts;

-- One row per unit. A metric's mean in an arm is the sum of its _sum over the sum of its _count.
CREATE VIEW metrics_by_unit AS
SELECT
  e.experiment_id,
  e.variation_id,
  e.unit,
  COUNT(*) AS requests,
{sums}
FROM shoal_exposures e JOIN shoal_facts f ON f.unit = e.unit
GROUP BY e.experiment_id, e.variation_id, e.unit;
"""


def _time(time_s: float) -> datetime:
    return datetime.fromtimestamp(float(time_s), UTC)
