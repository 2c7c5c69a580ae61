"""Puts a replica's metrics together."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Mapping, Sequence

from policies.budget import Controller
from policies.experiments.shadow import Shadow
from router.catalog import Catalog
from router.config import AppArgs
from router.engines.base import EngineClient
from router.experiments.experiments import Experiments
from router.ledger.writer import Ledger
from router.metrics.budgets import budget_gauges
from router.metrics.live import Live
from router.metrics.memory import CountingRecorder, MemoryStore
from router.metrics.metrics import Metrics
from router.metrics.reports import Reports
from router.metrics.store import LedgerStore
from router.record import Recorder


def build_metrics(
    args: AppArgs,
    catalog: Catalog,
    *,
    engines: Mapping[str, EngineClient],
    recorder: Recorder,
    experiments: Experiments | None,
    shadows: Sequence[Shadow],
    controllers: Mapping[str, Controller],
) -> Metrics:
    """Return the metrics of a replica whose records `recorder` keeps.

    With a ledger they are those of all its replicas; without, this one's alone.
    """
    live = Live(catalog=catalog, recorder=recorder, num_replicas=args.ingress.min_replicas)
    holder = f"{socket.gethostname()}-{uuid.uuid4().hex}"
    if not isinstance(recorder, Ledger) or experiments is None:
        counted = recorder.store if isinstance(recorder, CountingRecorder) else MemoryStore()
        return Metrics(store=counted, live=live, catalog=catalog, engines=engines, holder=holder)
    database, store = recorder.database, LedgerStore(recorder.database)
    return Metrics(
        store=store,
        live=live,
        catalog=catalog,
        engines=engines,
        holder=holder,
        reports=Reports(
            database=database,
            store=store,
            experiments=experiments,
            shadows=shadows,
            controllers=controllers,
        ),
        read_budgets=lambda now_s: budget_gauges(database, args.budgets, now_s=now_s),
    )
