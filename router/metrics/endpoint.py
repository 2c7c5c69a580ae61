"""`GET /metrics`."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response

from router.experiments.endpoints import Identify
from router.metrics.metrics import Metrics


def add_metrics_route(api: FastAPI, metrics: Metrics, *, identify: Identify) -> None:
    """Add `GET /metrics` for those whom `identify` lets in."""

    async def page(request: Request) -> Response:
        await identify(request)
        content, content_type = await metrics.page(request.headers.get("accept", ""))
        return Response(content, media_type=content_type)

    api.add_api_route("/metrics", page, methods=["GET"])
