"""The HTTP application: routes, and errors in OpenAI's shape for everything that has no route."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from ipaddress import ip_address
from typing import Any, Literal

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from sqlalchemy.exc import SQLAlchemyError
from starlette import types
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from models.engines.base import EngineStats
from models.errors import EngineError, RequestError
from models.fair import CLIENT
from policies.carbon.grid import ScheduledGrid
from router.access.authentication import Identify, KeyRejected, credentials
from router.access.keys import KeysError, Scope
from router.access.limits import CapError
from router.adapters import add_adapter_routes
from router.admin import add_admin_routes, add_reload_routes
from router.anthropic_api.answer import MessagesEndpoint
from router.batching import OFFLINE, Batching
from router.bodies import address_of
from router.catalog.catalog import describe_model, list_models
from router.config import AppArgs
from router.dashboard.routes import Access, add_dashboard, may_see
from router.decide import named_target
from router.errors import ApiError, to_api_error, unavailable
from router.experiments.endpoints import add_experiment_routes, add_feedback_route
from router.metrics.page import add_metrics_route
from router.openai_api.batches import BatchStore, add_batch_routes
from router.openai_api.chat import ChatEndpoint
from router.openai_api.completions import CompletionEndpoint
from router.openai_api.encoding import EmbeddingsEndpoint, RerankEndpoint
from router.openai_api.endpoint import WireFormat
from router.openai_api.files import FileStore, add_file_routes
from router.openai_api.responses import ResponsesEndpoint
from router.openai_api.shapes import ModelEntry, ModelList
from router.openai_api.stored import add_response_routes
from router.openapi import describe, described
from router.record import CLIENT_CLOSED_REQUEST
from router.service import Service
from router.streams import ClientDisconnected
from router.token_routes import add_token_routes
from router.whatif import last_week

_HEALTH_TIMEOUT_S = 5.0
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]\s]+)(?::[0-9]*)?")
_OWN_PAGE = r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?"
_PREFLIGHT_S = 600


@dataclass(frozen=True, kw_only=True)
class EngineHealth(EngineStats):
    """How an engine is; one that does not answer tells only why."""

    ok: bool
    error: str | None = None


class WorkerHealth(BaseModel):
    """How something is that runs beside the requests."""

    ok: bool
    failures: int


class Health(BaseModel):
    """Whether all that serves is well; with status 503 it is not."""

    status: Literal["ok", "unhealthy"]
    engines: dict[str, EngineHealth]
    workers: dict[str, WorkerHealth]


def create_api(service: Service, args: AppArgs) -> FastAPI:
    """Return the application that serves `service`, and closes it when it shuts down."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.close()

    api = FastAPI(title="Shoal", version=version("shoal"), lifespan=lifespan)
    endpoints: tuple[WireFormat, ...] = (
        ChatEndpoint(),
        CompletionEndpoint(service.catalog.members.tokenizer_for),
        MessagesEndpoint(),
        ResponsesEndpoint(service.responses),
        EmbeddingsEndpoint(),
        *map(RerankEndpoint, ("/v1/rerank", "/v2/rerank", "/rerank")),
    )
    for endpoint in endpoints:
        _add_endpoint(api, service, endpoint)

    identify = _identify(service, "user")
    sees = _admin(service, args.dashboard.access)
    # A proxy that lets everybody see the page makes nobody an administrator.
    access = "key" if args.dashboard.access == "anyone" else args.dashboard.access
    acts = _admin(service, access)

    api.add_middleware(Guard, hosts=args.hosts, keyless=not args.auth.required)
    api.add_middleware(Forgiving)
    if args.http.cors_origins:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=args.http.cors_origins,
            allow_origin_regex=_OWN_PAGE if "loopback" in args.http.cors_origins else None,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", "openai-processing-ms"],
            max_age=_PREFLIGHT_S,
        )

    async def tell(request: Request, error: Exception) -> JSONResponse:
        return _error(to_api_error(error), request.url.path)

    # Those of requests for answers are told, and recorded, by the service.
    for kind in (
        ApiError,
        RequestError,
        KeyRejected,
        KeysError,
        CapError,
        SQLAlchemyError,
        TimeoutError,
        Exception,  # what is none of these closes its connection, too
    ):
        api.add_exception_handler(kind, tell)

    async def nobody(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    for left in (ClientDisconnected, ClientDisconnect):
        api.add_exception_handler(left, nobody)

    add_token_routes(api, lambda: service.catalog, identify=identify, bodies=service.bodies)
    names = [shadow.name for shadow in service.mirror.shadows if shadow.judge is None]
    add_feedback_route(
        api,
        service.ledger,
        identify=identify,
        bodies=service.bodies,
        shadows=names,
        keep_text=args.ledger.keep_text,
    )
    add_dashboard(
        api,
        args.dashboard,
        now=lambda: service.catalog,
        database=service.ledger.database,
        caps=service.editions.server_caps,
        identify=sees,
        simulate=lambda settings: last_week(
            service.ledger.database, args, service.catalog.pool, settings
        ),
    )
    add_admin_routes(api, service.ledger.database, identify=acts, bodies=service.bodies)
    add_reload_routes(api, service.editions, identify=acts)
    add_adapter_routes(
        api,
        service.editions,
        roots=args.http.adapter_roots,
        identify=acts,
        bodies=service.bodies,
    )
    add_experiment_routes(api, service.experiments, service.mirror, identify=sees)
    add_metrics_route(api, service.metrics, identify=sees)

    _add_batches(api, service, args, endpoints, identify)
    add_response_routes(api, service.responses, identify=identify)
    _add_models(api, service, identify)

    @api.get("/health", openapi_extra=described(Health))
    async def health() -> JSONResponse:
        """Say whether all that serves is well: 200, or 503 that names what is not."""
        return await _health(service)

    @api.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> JSONResponse:
        message = {
            404: f"There is nothing at {request.url.path}.",
            405: f"{request.method} is not allowed at {request.url.path}.",
        }.get(error.status_code, str(error.detail))
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        return _error(
            ApiError(error.status_code, message, code=code, headers=dict(error.headers or {})),
            request.url.path,
        )

    describe(api)
    return api


class Forgiving:
    """Answers HEAD where GET is answered, and a path with a slash too many like one without."""

    def __init__(self, app: types.ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        """Pass the request on; the body of an answer to HEAD stays here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].startswith("/v1/"):
            scope = {**scope, "path": scope["path"].rstrip("/")}
        if scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_head(message: types.Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, send_head)


class Drained:
    """Tells clients of requests for which a server that stops cannot wait any longer.

    The server cancels them then. What has begun to be answered is cut off.
    """

    def __init__(self, app: types.ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        """Pass the request on, and answer 503 where it was cancelled before anybody answered."""
        begun = False

        async def noted(message: types.Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            if scope["type"] != "http":
                raise
            if not begun:
                message = "The server stops, and this took longer than it waits; ask again."
                stops = unavailable(message, "server_stops")
                await _error(stops, scope["path"])(scope, receive, send)


class Guard:
    """Refuses what a web page from elsewhere could have a browser send.

    Pages may send text without asking, and point a name of their own at this machine (DNS
    rebinding). `hosts` are the names that the server goes by (None: any), beside loopback's own
    and names without a dot. A `keyless` one takes posts only as JSON.
    """

    def __init__(self, app: types.ASGIApp, *, hosts: Collection[str] | None, keyless: bool) -> None:
        self._app = app
        self._hosts = None if hosts is None else frozenset(hosts)
        self._keyless = keyless

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        """Pass the request on, or refuse it."""
        refusal = self._refusal(Request(scope)) if scope["type"] == "http" else None
        app = self._app if refusal is None else _error(refusal, scope["path"])
        await app(scope, receive, send)

    def _refusal(self, request: Request) -> ApiError | None:
        name = _hostname(request)
        # Browsers send a name always, old programs none. One without a dot is nobody's on the
        # Internet, and what containers beside the server and plain sockets go by.
        plain = name and not {*name} & {*".:"}
        foreign = "host" in request.headers and not plain and not _is_loopback(name)
        if self._hosts is not None and foreign and name not in self._hosts:
            return ApiError(
                421,
                f"This server goes by {', '.join(sorted(self._hosts))} only; "
                "the configuration's hosts may name others.",
                code="misdirected_request",
            )
        if not self._keyless or request.method != "POST":
            return None
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        from_page = "origin" in request.headers
        uploads = kind == "multipart/form-data" and request.url.path == "/v1/files"
        if kind == "application/json" or (not from_page and (not kind or uploads)):
            return None
        return ApiError(
            415,
            f"The content-type {kind[:80]!r} is not supported; send application/json.",
            code="unsupported_media_type",
        )


def _hostname(request: Request) -> str:
    """Return the name that the request's Host header gives; empty if it is none."""
    found = _HOST.fullmatch(request.headers.get("host", ""))
    return found[1].strip("[]").lower() if found else ""


def _is_loopback(name: str) -> bool:
    try:
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


def _identify(service: Service, scope: Scope) -> Identify:
    """Return what tells the key id of who sends a request."""

    async def key_id(request: Request) -> str | None:
        CLIENT.set(address_of(request))
        key = await service.authenticator.authenticate(credentials(request.headers), scope=scope)
        if key is not None:
            CLIENT.set(key.id)
        return key.id if key else None

    return key_id


def _admin(service: Service, access: Access) -> Identify:
    """Return what lets in who brings an admin's key, or needs none by `access`."""
    identify = _identify(service, "admin")

    async def key_id(request: Request) -> str | None:
        found = await identify(request)
        if found is None and not may_see(access, request):
            raise KeyRejected(
                "This needs an admin's key: make one with "
                "`shoal keys create --scope admin --name ...`."
            )
        return found

    return key_id


def _add_endpoint(api: FastAPI, service: Service, endpoint: WireFormat) -> None:
    async def answer(request: Request) -> Response:
        return await service.process(request, endpoint)

    shapes = endpoint.shapes
    api.add_api_route(
        endpoint.path,
        answer,
        methods=["POST"],
        name=endpoint.path.removeprefix("/v1/"),
        # The body is read and checked by the endpoint itself, once.
        openapi_extra=described(
            shapes.answers, takes=shapes.takes, streams=shapes.streams, errors=shapes.errors
        ),
    )


def _add_models(api: FastAPI, service: Service, identify: Identify) -> None:
    @api.get("/v1/models", openapi_extra=described(ModelList))
    async def models(request: Request) -> JSONResponse:
        """List every name that `model` takes: policies and the pool's models."""
        await identify(request)
        return JSONResponse(list_models(service.catalog))

    @api.get("/v1/models/{name:path}", openapi_extra=described(ModelEntry))
    async def model(request: Request, name: str) -> JSONResponse:
        """Describe one of them."""
        await identify(request)
        named_target(service.catalog, name)
        return JSONResponse(describe_model(service.catalog, name))


def _add_batches(
    api: FastAPI,
    service: Service,
    args: AppArgs,
    endpoints: Sequence[WireFormat],
    identify: Identify,
) -> None:
    """Add files and batches, and have the batches worked on beside the requests."""
    database = service.ledger.database
    files, batches = FileStore(database, args.batches), BatchStore(database)
    offline = {one.path: one for one in endpoints if one.path in OFFLINE}
    add_file_routes(api, files, identify=identify, bodies=service.bodies)
    add_batch_routes(
        api, batches, files, endpoints=offline, identify=identify, bodies=service.bodies
    )
    service.run_beside(
        Batching(
            service,
            endpoints=offline,
            batches=batches,
            files=files,
            config=args.batches,
            bodies=service.bodies,
            announced=_hours(args, service),
        )
    )


def _hours(args: AppArgs, service: Service) -> Callable[[float], float | None] | None:
    """Return what announces how dear an hour is, where batches wait for better ones."""
    if args.batches.wait_for is None:
        return None
    if args.batches.tariff_file is None:
        return service.catalog.prices.grid.announced
    file = service.catalog.pool.folder / args.batches.tariff_file
    return ScheduledGrid.read(file, column="usd_per_kwh").announced


async def _health(service: Service) -> JSONResponse:
    async def ask(name: str) -> tuple[str, dict[str, Any]]:
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                return name, {"ok": True, **asdict(await service.engines[name].stats())}
        except (EngineError, TimeoutError) as error:
            return name, {"ok": False, "error": str(error) or "no answer"}

    engines = dict(await asyncio.gather(*map(ask, service.engines)))
    workers = {
        worker.name: {"ok": worker.failure is None, "failures": worker.num_failures}
        for worker in service.workers
    }
    ok = all(part["ok"] for part in (*engines.values(), *workers.values()))
    status = "ok" if ok else "unhealthy"
    return JSONResponse(
        {"status": status, "engines": engines, "workers": workers}, 200 if ok else 503
    )


def _error(error: ApiError, path: str) -> JSONResponse:
    """Return what is told at `path`, in the words of its dialect."""
    anthropic = path.startswith("/v1/messages")
    body = MessagesEndpoint().error(error) if anthropic else error.body()
    return JSONResponse(body, error.status, error.headers)
