"""The HTTP application: routes, and errors in OpenAI's shape for everything that has no route."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from models.errors import EngineError
from router.access.keys import KeyRejected, Scope
from router.access.limits import Cap
from router.anthropic_api.answer import MessagesEndpoint
from router.anthropic_api.counting import add_count_route
from router.dashboard.routes import DashboardConfig, add_dashboard
from router.decide import named_target
from router.errors import ApiError, to_api_error
from router.experiments.endpoints import Identify, add_experiment_routes, add_feedback_route
from router.gate import credentials
from router.metrics.page import add_metrics_route
from router.openai_api.chat import ChatEndpoint
from router.openai_api.completions import CompletionEndpoint
from router.openai_api.endpoint import WireFormat
from router.openai_api.models import describe, list_models
from router.service import Service

_HEALTH_TIMEOUT_S = 5.0


def create_api(
    service: Service, *, dashboard: DashboardConfig | None = None, caps: tuple[Cap, ...] = ()
) -> FastAPI:
    """Return the application that serves `service`, and closes it when it shuts down.

    The built-in page shows what is left of the server's `caps`.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.close()

    api = FastAPI(title="Shoal", version=version("shoal"), lifespan=lifespan)
    endpoints: tuple[WireFormat, ...] = (
        ChatEndpoint(),
        CompletionEndpoint(service.catalog.members.tokenizer),
        MessagesEndpoint(),
    )
    for endpoint in endpoints:
        _add_endpoint(api, service, endpoint)

    def identify(scope: Scope) -> Identify:
        async def key_id(request: Request) -> str | None:
            key = await service.gate.identify(credentials(request.headers), scope=scope)
            return key.id if key else None

        return key_id

    async def tell(_: Request, error: Exception) -> JSONResponse:
        return _error(to_api_error(error))

    # Those of requests for answers are told, and recorded, by the service.
    for kind in (ApiError, KeyRejected, SQLAlchemyError, TimeoutError, Exception):
        api.add_exception_handler(kind, tell)

    add_count_route(
        api,
        service.catalog,
        identify=identify("user"),
        max_body_bytes=service.limits.max_body_bytes,
    )
    names = [shadow.name for shadow in service.mirror.shadows]
    add_feedback_route(api, service.ledger, identify=identify("user"), shadows=names)
    add_dashboard(
        api,
        dashboard or DashboardConfig(),
        catalog=service.catalog,
        database=service.ledger.database,
        caps=caps,
        identify=identify("admin"),
    )
    add_experiment_routes(api, service.experiments, service.mirror, identify=identify("admin"))
    add_metrics_route(api, service.metrics, identify=identify("admin"))

    @api.get("/v1/models")
    async def models(request: Request) -> JSONResponse:
        """List every name that `model` takes: policies and the pool's models."""
        await identify("user")(request)
        return JSONResponse(list_models(service.catalog))

    @api.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> JSONResponse:
        """Describe one of them."""
        await identify("user")(request)
        named_target(service.catalog, name)
        return JSONResponse(describe(service.catalog, name))

    @api.get("/health")
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
            ApiError(error.status_code, message, code=code, headers=dict(error.headers or {}))
        )

    return api


def _add_endpoint(api: FastAPI, service: Service, endpoint: WireFormat) -> None:
    async def answer(request: Request) -> Response:
        return await service.process(request, endpoint)

    schema = endpoint.schema.model_json_schema()
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    api.add_api_route(
        endpoint.path,
        answer,
        methods=["POST"],
        name=endpoint.path.removeprefix("/v1/"),
        # The body is read and checked by the endpoint itself, once.
        openapi_extra={"requestBody": body},
    )


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


def _error(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)
