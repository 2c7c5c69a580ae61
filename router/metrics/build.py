"""Puts a replica's metrics together."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Mapping, Sequence

from policies.budget import Controller
from policies.experiments.shadow import Shadow
from router.catalog.catalog import Catalog
from router.config import AppArgs
from router.engines.base import EngineClient
from router.experiments.experiments import Experiments
from router.ledger.writer import Ledger
from router.metrics.budgets import budget_gauges
from router.metrics.live import Live
from router.metrics.metrics import Metrics
from router.metrics.reports import Reports
from router.metrics.store import Store


def build_metrics(
    args: AppArgs,
    catalog: Catalog,
    *,
    engines: Mapping[str, EngineClient],
    ledger: Ledger,
    experiments: Experiments,
    shadows: Sequence[Shadow],
    controllers: Mapping[str, Controller],
) -> Metrics:
    """Return the metrics of a replica, which are those of all that share its `ledger`."""
    database, store = ledger.database, Store(ledger.database)
    return Metrics(
        store=store,
        live=Live(catalog=catalog, ledger=ledger, num_replicas=args.ingress.min_replicas),
        catalog=catalog,
        engines=engines,
        holder=f"{socket.gethostname()}-{uuid.uuid4().hex}",
        reports=Reports(
            database=database,
            store=store,
            experiments=experiments,
            shadows=shadows,
            controllers=controllers,
        ),
        read_budgets=lambda now_s: budget_gauges(database, args.budgets, now_s=now_s),
    )
