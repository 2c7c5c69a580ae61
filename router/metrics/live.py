"""What one ingress replica knows of the present, and what several such replicas know together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from policies.carbon.grid import CachedGrid
from router.catalog.catalog import Catalog
from router.ledger.writer import Ledger
from router.metrics import families as f
from router.metrics.family import Merge, Series, Values

_STALE = "fallback:"


class Live:
    """This replica's gauges, and what it has counted since it was last asked."""

    def __init__(self, *, catalog: Catalog, ledger: Ledger, num_replicas: int) -> None:
        """Watch `catalog` and `ledger`; the configuration asks for `num_replicas` replicas."""
        self._catalog = catalog
        self._ledger = ledger
        self._num_replicas = num_replicas
        self._dropped_rows = 0

    def gauges(self) -> dict[Series, float]:
        """Return the gauges of this moment; cheap."""
        reading = self._catalog.prices.grid_reading()
        found = {
            f.REPLICAS_WANTED.series(): float(self._num_replicas),
            f.GRID_INTENSITY.series(): reading.gco2e_per_kwh,
            f.PENDING_ROWS.series(): float(self._ledger.pending_rows),
        }
        if isinstance(self._catalog.prices.grid, CachedGrid):
            found[f.GRID_STALE.series()] = float(reading.source.startswith(_STALE))
        for name, controller in self._catalog.policies.controllers.items():
            for resource, price in controller.prices().items():
                found[f.PRICES[resource].series(name)] = price
        return found

    def counted(self) -> Values:
        """Return what was counted since the last `counted`, once."""
        before, self._dropped_rows = self._dropped_rows, self._ledger.dropped_rows
        return {f.DROPPED_ROWS.series(): float(self._dropped_rows - before)}


def merge(replicas: Iterable[Values]) -> dict[Series, float]:
    """Return the gauges of all replicas as one, by each family's rule, with their number."""
    gathered: dict[Series, list[float]] = defaultdict(list)
    num_replicas = 0
    for gauges in replicas:
        num_replicas += 1
        for series, value in gauges.items():
            gathered[series].append(value)
    merged = {
        series: _MERGE[f.BY_NAME[series[0]].merge](values)
        for series, values in gathered.items()
        if series[0] in f.BY_NAME
    }
    return {**merged, f.REPLICAS.series(): float(num_replicas)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


_MERGE: dict[Merge, Callable[[list[float]], float]] = {"mean": _mean, "sum": sum, "max": max}
