"""The routes of the page: its files for everybody, its figures for admins.

The files say nothing of the server, so they need no key: the page itself asks for one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import TypeAlias

from fastapi import FastAPI, Request, Response
from starlette.responses import JSONResponse

from router.caps.limits import Cap
from router.catalog.catalog import Catalog
from router.dashboard.config import LOOPBACK, Access, DashboardConfig
from router.dashboard.figures import Figures
from router.dashboard.page import INDEX, read_page
from router.dashboard.windows import WINDOWS
from router.errors import ApiError, bad_request
from router.keys import KeyRejected
from router.ledger.database import Database

_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")

# Tells the key id of an admin, None for an anonymous request. Raises `KeyRejected`.
Identify: TypeAlias = Callable[[Request], Awaitable[str | None]]


def add_dashboard(
    api: FastAPI,
    config: DashboardConfig,
    *,
    catalog: Catalog,
    database: Database,
    caps: tuple[Cap, ...],
    identify: Identify,
) -> None:
    """Add `GET /dashboard`, its files, and `GET /dashboard/data?window=1h`.

    `caps` are the server's budgets. Adds nothing if `config` says so.
    """
    if not config.enabled:
        return
    files = read_page()
    figures = Figures(database, caps)

    async def page(request: Request) -> Response:
        name = request.path_params.get("file", INDEX)
        if name not in files:
            return _refusal(
                ApiError(404, f"There is nothing at {request.url.path}.", code="not_found")
            )
        return files[name].response(request.headers.get("if-none-match"))

    async def data(request: Request) -> JSONResponse:
        if await identify(request) is None and not may_see(config.access, request):
            raise KeyRejected(
                "The dashboard needs an admin's key: make one with "
                "`shoal keys create --scope admin --name ...`."
            )
        window = request.query_params.get("window", "1h")
        if window not in WINDOWS:
            allowed = ", ".join(WINDOWS)
            return _refusal(bad_request(f"window: {window!r} is not one of {allowed}", "window"))
        grid = catalog.prices.grid_reading()
        return JSONResponse(
            {
                **await figures.of(window),
                "server": {
                    "version": version("shoal"),
                    "pool": catalog.pool.name,
                    "names": list(catalog.targets),
                    "grid": {"gco2e_per_kwh": grid.gco2e_per_kwh, "source": grid.source},
                },
            },
            headers={"cache-control": "no-store"},
        )

    # Before `{file}`, which would match it.
    api.add_api_route("/dashboard/data", data, methods=["GET"])
    for path in ("/dashboard", "/dashboard/{file:path}"):
        api.add_api_route(path, page, methods=["GET"], include_in_schema=False)


def may_see(access: Access, request: Request) -> bool:
    """Return whether `request` may see the figures without a key.

    A web site that a person here visits can point its own name at 127.0.0.1 (DNS rebinding), and
    a proxy here brings strangers: so the name must be this machine's, and nobody may have
    forwarded the request from elsewhere.
    """
    if access == "anyone":
        return True
    if access == "key" or request.url.hostname not in LOOPBACK:
        return False
    forwarded = ",".join(request.headers.get(name, "") for name in _FORWARDED)
    return all(part.strip().strip('"') in {"", *LOOPBACK} for part in forwarded.split(","))


def _refusal(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)
