"""Puts a service together from its arguments: the same in one process and on Ray."""

from __future__ import annotations

import gc
import logging
import socket
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace

from models.pool import Pool
from policies.budget.controller import Controller
from policies.carbon.grid import CachedGrid
from policies.experiments.shadow import Shadow, ShadowMeter
from router.access.authentication import Authenticator
from router.access.budgets import Budgets
from router.accounts import Watcher
from router.background import BudgetSync, GridFeed
from router.catalog.catalog import Catalog, load_catalog
from router.config import AppArgs
from router.editions import Edition, Editions, next_edition, publish
from router.engines import EngineClient
from router.experiments.experiments import Experiments, read_definitions
from router.experiments.shadows import shadow_report
from router.ledger.database import Database, open_database
from router.ledger.writer import Ledger, installation_secret
from router.logs import REQUESTS_LOGGER, RequestLog
from router.metrics.counting import count_rows
from router.metrics.page import Metrics
from router.openai_api.stored import ResponseStore
from router.service import Background, Service
from router.tracing import open_tracer

# PostgreSQL ends what takes longer, so that nothing hangs on a lock for ever.
_STATEMENT_TIMEOUT_S = 30.0


# How long a thread keeps the interpreter's lock once another asks for it; Python's 5 ms would make
# every request wait that long, several times over, wherever a large body is read beside it.
_SWITCH_INTERVAL_S = 0.0005


def settle_in() -> None:
    """Prepare this process to serve, once all is here that stays as long as the server.

    The garbage collector passes it over from now on: to walk through it takes a tenth of a second,
    as often as a large body is parsed, and nothing else runs meanwhile.
    """
    gc.collect()
    gc.freeze()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def open_ledger(args: AppArgs) -> Ledger:
    """Return the configured ledger, which also counts its rows for the metrics.

    Raises `LedgerError`.
    """
    return Ledger(
        open_database(args.ledger.url, statement_timeout_s=_STATEMENT_TIMEOUT_S),
        flush_interval_s=args.ledger.flush_interval_s,
        queue_rows=args.ledger.queue_rows,
        refused_rows_per_minute=args.ledger.refused_rows_per_minute,
        max_gb=args.ledger.max_gb,
        count=count_rows,
        logger=logging.getLogger("shoal.ledger"),
    )


def check_ledger(args: AppArgs) -> None:
    """Find what is wrong with the ledger before any replica starts. Raises `LedgerError`."""
    open_database(args.ledger.url, statement_timeout_s=_STATEMENT_TIMEOUT_S).dispose()


def check_experiments(args: AppArgs, pool: Pool, catalog: Catalog) -> None:
    """Find what is wrong with the experiments before any replica starts.

    Raises `ExperimentError` and `LedgerError`.
    """
    definitions, _ = read_definitions(args)
    if definitions:
        database = open_database(args.ledger.url)
        try:
            Experiments(definitions, args=args, pool=pool, catalog=catalog, database=database)
        finally:
            database.dispose()


def publish_reload(args: AppArgs, pool: Pool) -> int:
    """Have the running server of `args` and `pool` take up what its files say now.

    Returns the number of the edition that its replicas follow.

    Raises `ValueError` where something cannot be used or cannot change; then nothing changes.
    """
    # Only the models and engines are compared; policies that run may have lost their files.
    catalog = load_catalog(replace(pool, policies={}, scorers={}), carbon=args.carbon)
    database = open_database(args.ledger.url, statement_timeout_s=_STATEMENT_TIMEOUT_S)
    try:
        running = Edition(number=1, loaded_s=0.0, args=args, catalog=catalog)
        return publish(next_edition(running, database), database).number
    finally:
        database.dispose()


def compose(
    args: AppArgs,
    pool: Pool,
    catalog: Catalog,
    *,
    engines: Mapping[str, EngineClient],
    ledger: Ledger,
    echo_request_id: bool = True,
) -> Service:
    """Return the service; it starts the configured experiments, or takes them up again.

    Raises `ExperimentError`, also for an experiment that changed while it has data.
    """
    first = Edition(number=1, loaded_s=time.time(), args=args.started(), catalog=catalog)
    editions = Editions(first, ledger.database)
    args, catalog = editions.current.args, editions.current.catalog
    pool = catalog.pool
    definitions, shadows = read_definitions(args, pool)
    controllers = _controllers(catalog)
    experiments = Experiments(
        definitions, args=args, pool=pool, catalog=catalog, database=ledger.database
    )
    budgets = Budgets(
        open_database(args.ledger.url, fast_commits=True, statement_timeout_s=_STATEMENT_TIMEOUT_S),
        args.budgets,
        holder=f"{socket.gethostname()}-{uuid.uuid4().hex}",
        logger=logging.getLogger("shoal.budgets"),
    )
    service = Service(
        authenticator=Authenticator(ledger.database, args.auth),
        budgets=budgets,
        keep_text=args.ledger.keep_text,
        user_secret=installation_secret(ledger.database, "users"),
        editions=editions,
        engines=engines,
        ledger=ledger,
        echo_request_id=echo_request_id,
        experiments=experiments,
        responses=ResponseStore(ledger.database, args.responses),
        shadows=_meters(args, shadows, ledger.database),
        metrics=Metrics(
            args,
            editions,
            engines=engines,
            ledger=ledger,
            experiments=experiments,
            shadows=shadows,
            controllers=controllers,
        ),
        watchers=_watchers(args),
        background=_background(args, catalog, ledger.database, controllers),
    )

    def follow(edition: Edition) -> None:
        budgets.configure(edition.args.budgets)
        service.bodies.max_bytes = edition.args.limits.max_body_bytes
        service.bodies.max_values = edition.args.limits.max_body_values
        service.bodies.room.max_bytes = edition.args.limits.max_arriving_bytes
        service.bodies.timeout_s = edition.args.limits.body_timeout_s
        experiments.catalog = edition.catalog
        controllers.clear()
        controllers.update(_controllers(edition.catalog))

    editions.followers.append(follow)
    return service


def _controllers(catalog: Catalog) -> dict[str, Controller]:
    """Return what holds the targets of policies, by the policies' names."""
    return {
        name: controller
        for name, controller in catalog.policies.controllers.items()
        if controller.targets
    }


def _watchers(args: AppArgs) -> list[Watcher]:
    """Return what follows the requests beside the ledger: the log, and traces."""
    watchers: list[Watcher] = []
    if args.logs.requests:
        watchers.append(RequestLog(logging.getLogger(REQUESTS_LOGGER)))
    if args.tracing is not None:
        watchers.append(open_tracer(args.tracing))
    return watchers


def _meters(args: AppArgs, shadows: Sequence[Shadow], database: Database) -> list[ShadowMeter]:
    """Return a meter per shadow that knows what today's predecessors of this process spent."""
    now_s = time.time()
    return [
        ShadowMeter(
            shadow,
            num_processes=args.ingress.max_replicas,
            spent_usd=found["usd_today"],
            now_s=now_s,
        )
        for shadow, found in zip(
            shadows, shadow_report(database, shadows, now_s=now_s), strict=True
        )
    ]


def _background(
    args: AppArgs, catalog: Catalog, database: Database, controllers: Mapping[str, Controller]
) -> list[Background]:
    """Return what keeps the grid's intensity and the budgets' spending current."""
    background: list[Background] = []
    if args.carbon.feed is not None and isinstance(catalog.prices.grid, CachedGrid):
        background.append(GridFeed(args.carbon.feed, catalog.prices.grid))
    background.append(BudgetSync(controllers, database))
    return background
