"""The application in one process, without Ray: for laptops and debugging (`shoal serve --local`).

Engines and HTTP share an event loop; there is one replica of each.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import uvicorn

from models.engines.registry import supervised_engine
from models.pool import Pool
from router.catalog.catalog import Catalog
from router.compose import compose
from router.config import AppArgs
from router.energy import lane_meter
from router.engines.worker import EngineWorker, set_num_threads
from router.ingress import create_api
from router.ledger.writer import Ledger
from router.local_http import ImpatientProtocol
from router.service import Service


@asynccontextmanager
async def local_service(
    args: AppArgs, pool: Pool, catalog: Catalog, ledger: Ledger
) -> AsyncIterator[Service]:
    """Start the pool's engines here and yield the service; stop them at the end."""
    async with AsyncExitStack() as stack:
        workers: dict[str, EngineWorker] = {}
        for spec in pool.engines:
            engine = supervised_engine(spec, pool.models_of(spec.name))
            worker = EngineWorker(engine, lane_meter(args.carbon, spec))
            set_num_threads(args.num_threads)
            stack.push_async_callback(worker.stop)
            await worker.start()
            workers[spec.name] = worker
        yield compose(args, pool, catalog, engines=workers, ledger=ledger)


def http_server(
    service: Service, *, host: str, port: int, args: AppArgs | None = None
) -> uvicorn.Server:
    """Return the HTTP server of `service`, not yet started; `args` is its configuration."""
    args = args or AppArgs()
    return uvicorn.Server(
        uvicorn.Config(
            create_api(service, dashboard=args.dashboard, caps=args.budgets.server_caps()),
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            http=ImpatientProtocol,
            timeout_graceful_shutdown=round(args.ingress.drain_s),
        )
    )
