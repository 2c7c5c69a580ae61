"""Metrics without a ledger: each replica counts for itself, from its start."""

from __future__ import annotations

from router.ledger.writer import row_of
from router.metrics.derive import Tally, tally
from router.metrics.family import Series, Values
from router.metrics.store import Snapshot
from router.record import RequestRecord


class MemoryStore:
    """A `Store` of one process."""

    def __init__(self) -> None:
        self._counters = Tally()
        self._snapshots: dict[str, Snapshot] = {}

    def add(self, counts: Values) -> None:
        """Add `counts`."""
        for series, value in counts.items():
            self._counters[series] += value

    def counters(self) -> dict[Series, float]:
        """Return every counter."""
        return dict(self._counters)

    def publish(
        self, holder: str, gauges: Values, *, now_s: float, counts: Values | None = None
    ) -> None:
        """Replace what `holder` published by `gauges`, and add `counts`."""
        self._snapshots[holder] = Snapshot(holder=holder, time_s=now_s, gauges=dict(gauges))
        self.add(counts or {})

    def snapshots(self, *, since_s: float) -> list[Snapshot]:
        """Return what was published after `since_s`."""
        return [found for found in self._snapshots.values() if found.time_s > since_s]

    def claim(self, holder: str, *, now_s: float, every_s: float) -> bool:
        """Return whether the caller is to publish as `holder` now: nobody was, for `every_s`."""
        last = self._snapshots.get(holder)
        if last is not None and last.time_s > now_s - every_s:
            return False
        gauges = last.gauges if last is not None else {}
        self._snapshots[holder] = Snapshot(holder=holder, time_s=now_s, gauges=gauges)
        return True

    def forget(self, *, before_s: float, holder: str | None = None) -> None:
        """Delete what was published before `before_s`, and all that `holder` published."""
        self._snapshots = {
            name: snapshot
            for name, snapshot in self._snapshots.items()
            if snapshot.time_s >= before_s and name != holder
        }


class CountingRecorder:
    """Counts records and keeps none: the `Recorder` where the ledger is off."""

    def __init__(self) -> None:
        self.store = MemoryStore()

    def record(self, record: RequestRecord) -> None:
        """Count `record`."""
        self.store.add(tally([row_of(record)]))

    async def close(self) -> None:
        """Nothing is held."""
