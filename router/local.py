"""The application in one process, without Ray: for laptops and debugging (`shoal serve --local`).

Engines and HTTP share an event loop; there is one replica of each. uvicorn waits for ever for the
end of a request's head, however long; Ray Serve has HAProxy in front for that, this server closes
connections.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol
from uvicorn.protocols.http.h11_impl import H11Protocol

from models.engines.registry import supervised_engine, with_threads
from models.pool import Pool
from router.catalog.catalog import Catalog
from router.compose import compose
from router.config import AppArgs
from router.energy import LaneMeters
from router.engines import EngineWorker, set_num_threads
from router.haproxy import HEADER_TIMEOUT_S
from router.ingress import Drained, create_api
from router.ledger.writer import Ledger
from router.service import Service

_MOST_HEAD_BYTES = 2**16
_OLD_REQUEST = re.compile(rb"[A-Z]+ \S+ HTTP/1\.0\r?\n")
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)

if TYPE_CHECKING:
    _Base = asyncio.Protocol
    _Auto = asyncio.Protocol
else:
    _Base = object
    _Auto = AutoHTTPProtocol


class Impatient(_Base):
    """Closes a connection whose request head is too long, or takes longer than `head_timeout_s`."""

    head_timeout_s: float = HEADER_TIMEOUT_S
    _num_bytes = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for the first request."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Wait on while no request has begun that is not answered yet."""
        super().data_received(data)
        cycle = getattr(self, "cycle", None)
        in_head = cycle is None or (cycle.response_complete and not cycle.more_body)
        self._num_bytes = self._num_bytes + len(data) if in_head else 0
        if self._num_bytes > _MOST_HEAD_BYTES:
            self._close(b"HTTP/1.1 431 Request Header Fields Too Large\r\n\r\n")
        elif cycle is not None and not cycle.response_complete:
            self._stop_waiting()
        elif self._timer is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self.head_timeout_s, self._close)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close(self, told: bytes = b"") -> None:
        self._stop_waiting()
        transport = getattr(self, "transport", None)
        if transport is not None:
            transport.write(told)
            transport.close()


class OtherProtocol(Impatient, H11Protocol):
    """uvicorn's other protocol, for what `ImpatientProtocol` hands over."""

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: nobody has to do anything about an offer that is declined."""


class ImpatientProtocol(Impatient, _Auto):
    """uvicorn's protocol for all but peculiar clients."""

    _begun = False

    def data_received(self, data: bytes) -> None:
        """Read on, or leave the connection to the other protocol from its first bytes on."""
        if not self._begun:
            self._begun = True
            head, end, _ = data.partition(b"\r\n\r\n")
            if _OLD_REQUEST.match(data) or (end and _UPGRADE.search(head)):
                self._hand_over(data)
                return
        super().data_received(data)

    def _hand_over(self, data: bytes) -> None:
        """Have the connection of a peculiar client served by uvicorn's other protocol.

        This one would send chunks to one of HTTP/1.0, which does not know them (RFC 9112, 6.1), and
        loses the body of a request that offers to go on in another protocol, as Java's HttpClient
        does (h2c).
        """
        self._stop_waiting()
        base: Any = self
        base.connections.discard(self)
        old = OtherProtocol(base.config, base.server_state, base.app_state)
        old.connection_made(base.transport)
        base.transport.set_protocol(old)
        old.data_received(data)


@asynccontextmanager
async def local_service(
    args: AppArgs, pool: Pool, catalog: Catalog, ledger: Ledger
) -> AsyncIterator[Service]:
    """Start the pool's engines here and yield the service; stop them at the end."""
    async with AsyncExitStack() as stack:
        workers: dict[str, EngineWorker] = {}
        meters = LaneMeters(args.metering)
        for spec in pool.engines:
            limited = with_threads(spec, args.num_threads)
            engine = supervised_engine(limited, pool.loaded_by(spec.name))
            worker = EngineWorker(engine, meters.of(spec))
            set_num_threads(args.num_threads)
            stack.push_async_callback(worker.stop)
            await worker.start()
            workers[spec.name] = worker
        yield compose(args, pool, catalog, engines=workers, ledger=ledger)


def http_server(
    service: Service, *, host: str, port: int, args: AppArgs | None = None
) -> uvicorn.Server:
    """Return the HTTP server of `service`, not yet started; `args` is its configuration."""
    args = (args or AppArgs()).listening_on(host)
    return uvicorn.Server(
        uvicorn.Config(
            Drained(create_api(service, args)),
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            http=ImpatientProtocol,
            ws="none",
            timeout_keep_alive=args.http.keep_alive_s,
            timeout_graceful_shutdown=round(args.ingress.drain_s),
        )
    )
