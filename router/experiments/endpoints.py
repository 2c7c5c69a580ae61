"""The routes of experiments: feedback, reports, and what shadows found."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from router.errors import ApiError, to_api_error
from router.experiments.experiments import Experiments
from router.experiments.feedback import FeedbackBody, read_feedback, take_feedback
from router.experiments.mirror import Mirror
from router.experiments.shadow_report import shadow_report
from router.ledger.writer import Ledger

_MAX_FEEDBACK_BYTES = 2**20

# Tells the key id of who sends a request, None for an anonymous one. Raises `ApiError`.
Identify: TypeAlias = Callable[[Request], Awaitable[str | None]]


def add_feedback_route(
    api: FastAPI, ledger: Ledger, *, identify: Identify, shadows: Sequence[str] = ()
) -> None:
    """Add `POST /v1/feedback`; labels also score the answers of `shadows`, by name."""

    async def feedback(request: Request) -> JSONResponse:
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > _MAX_FEEDBACK_BYTES:
                raise ApiError(413, "The feedback is too long.", code="body_too_large")
        key_id = await identify(request)
        taken = await take_feedback(ledger, read_feedback(body), key_id=key_id, shadows=shadows)
        return JSONResponse(taken)

    schema = {"application/json": {"schema": FeedbackBody.model_json_schema()}}
    api.add_api_route(
        "/v1/feedback",
        _mapped(feedback),
        methods=["POST"],
        openapi_extra={"requestBody": {"required": True, "content": schema}},
    )


def add_experiment_routes(
    api: FastAPI, experiments: Experiments, mirror: Mirror, *, identify: Identify
) -> None:
    """Add `GET /v1/experiments`, `/v1/experiments/{name}` and `/v1/shadows`."""

    async def every(request: Request) -> JSONResponse:
        await identify(request)
        data = [summary.to_json() for summary in await experiments.summaries()]
        return JSONResponse({"object": "list", "data": data})

    async def one(request: Request) -> JSONResponse:
        await identify(request)
        name = request.path_params["name"]
        summary = await experiments.summary(name)
        if summary is None:
            known = ", ".join(e.name for e in experiments.definitions) or "none"
            raise ApiError(
                404,
                f"There is no experiment {name!r}; configured: {known}.",
                param="name",
                code="experiment_not_found",
            )
        return JSONResponse(summary.to_json())

    async def shadows(request: Request) -> JSONResponse:
        await identify(request)
        data = await asyncio.to_thread(
            shadow_report, experiments.database, mirror.shadows, now_s=time.time()
        )
        return JSONResponse({"object": "list", "data": data})

    api.add_api_route("/v1/experiments", _mapped(every), methods=["GET"])
    api.add_api_route("/v1/experiments/{name}", _mapped(one), methods=["GET"])
    api.add_api_route("/v1/shadows", _mapped(shadows), methods=["GET"])


def _mapped(
    handler: Callable[[Request], Awaitable[Response]],
) -> Callable[[Request], Awaitable[Response]]:
    """Return `handler` with its exceptions told in OpenAI's shape."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except Exception as error:
            told = to_api_error(error)
            if told.status == 500:
                raise
            return JSONResponse(told.body(), told.status, told.headers)

    return handle
