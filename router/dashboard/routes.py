"""The routes of the page: its files for everybody, its figures for admins.

The files say nothing of the server, so they need no key: the page itself asks for one. They are
read once: what is not among them cannot be asked for.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TypeAlias

from fastapi import FastAPI, Request, Response
from pydantic import ValidationError
from starlette.responses import JSONResponse

from policies.budget.simulate import Simulation
from policies.budgeted import BudgetedSettings
from policies.kinds import Strict, explain
from router.access.limits import Cap
from router.catalog.catalog import Catalog
from router.dashboard.figures import WINDOWS, Figures
from router.errors import ApiError, bad_request
from router.ledger.database import Database
from router.streams import until_disconnected

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

Access: TypeAlias = Literal["key", "loopback", "anyone"]

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# Nothing is loaded from elsewhere, nothing runs that is not one of our files.
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")

# Tells the key id of an admin, None for an anonymous request. Raises `KeyRejected`.
Identify: TypeAlias = Callable[[Request], Awaitable[str | None]]


class DashboardConfig(Strict):
    """The `dashboard:` section of the configuration.

    It says who may see the figures of `GET /dashboard`, which are those of all users together.

    `access` "key" asks for an admin's key. "loopback" asks for none of those who come from this
    machine by one of its own names (localhost, 127.0.0.1, ::1); `shoal serve` takes it where it
    listens on loopback only and the file does not say. "anyone" is for a server behind a proxy
    that authenticates. Where `auth.required`, a key is needed all the same.
    """

    enabled: bool = True
    access: Access = "key"

    def listening_on(self, host: str) -> DashboardConfig:
        """Return what holds for a server that listens on `host` and nowhere else."""
        if "access" in self.model_fields_set or host not in LOOPBACK:
            return self
        return self.model_copy(update={"access": "loopback"})


@dataclass(frozen=True, kw_only=True)
class File:
    """One file as it is sent."""

    content: bytes
    media_type: str
    etag: str

    def response(self, if_none_match: str | None) -> Response:
        """Return the file, or 304 where the browser has it."""
        headers = {**_HEADERS, "etag": self.etag}
        if if_none_match == self.etag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def read_page() -> Mapping[str, File]:
    """Return every file that a browser may load, by its path below `FOLDER`."""
    files = {}
    for path in sorted(FOLDER.rglob("*")):
        if path.suffix in _TYPES:
            content = path.read_bytes()
            files[path.relative_to(FOLDER).as_posix()] = File(
                content=content,
                media_type=_TYPES[path.suffix],
                etag=f'"{hashlib.sha256(content).hexdigest()[:32]}"',
            )
    return files


def add_dashboard(
    api: FastAPI,
    config: DashboardConfig,
    *,
    now: Callable[[], Catalog],
    database: Database,
    caps: Callable[[], tuple[Cap, ...]],
    identify: Identify,
    simulate: Callable[[BudgetedSettings], Simulation],
) -> None:
    """Add `GET /dashboard`, its files, and, for whom `identify` lets in, what they show.

    That is `GET /dashboard/data`, about what there is `now` with the server's budgets `caps`, and
    `GET /dashboard/target`, which has last week's traffic simulated under a target. Adds nothing if
    `config` says so.
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
        await identify(request)
        window = request.query_params.get("window", "1h")
        if window not in WINDOWS:
            allowed = ", ".join(WINDOWS)
            return _refusal(bad_request(f"window: {window!r} is not one of {allowed}", "window"))
        catalog = now()
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

    simulating = asyncio.Lock()

    async def target(request: Request) -> JSONResponse:
        await identify(request)
        try:
            settings = BudgetedSettings.model_validate(
                {"policy": {}, "targets": [_read_target(request.query_params)]}
            )
        except ValidationError as error:
            return _refusal(bad_request(explain(error), "amount"))

        async def simulated() -> Simulation:
            # One at a time: each keeps a core busy for seconds.
            async with simulating:
                return await database.reports.run(simulate, settings)

        # A page may have a browser ask very often, and go on asking.
        found = await until_disconnected(request.receive, simulated())
        resource = settings.targets[0].resource
        return JSONResponse(
            {
                "sentence": found.sentence(settings.targets, resource),
                "resource": resource,
                "total": found.total.to_json(),
                "domains": {name: sums.to_json() for name, sums in found.domains.items()},
            },
            headers={"cache-control": "no-store"},
        )

    # Before `{file}`, which would match them.
    api.add_api_route("/dashboard/data", data, methods=["GET"], include_in_schema=False)
    api.add_api_route("/dashboard/target", target, methods=["GET"], include_in_schema=False)
    for path in ("/dashboard", "/dashboard/{file:path}"):
        api.add_api_route(path, page, methods=["GET"], include_in_schema=False)


def _read_target(params: Mapping[str, str]) -> dict[str, object]:
    amount: object = params.get("amount", "")
    with suppress(ValueError):
        amount = float(str(amount))
    return {
        "resource": params.get("resource", "gco2e"),
        "amount": amount,
        "per": params.get("per", "hour"),
    }


def may_see(access: Access, request: Request) -> bool:
    """Return whether `request` may see the figures without a key.

    A web site that a person here visits can point its own name at 127.0.0.1 (DNS rebinding), and
    a proxy here brings strangers: so the name must be this machine's, and nobody may have
    forwarded the request from elsewhere. Pages of other servers here may ask for answers
    (`http.cors_origins`), but see no figures.
    """
    if access == "anyone":
        return True
    if access == "key" or request.url.hostname not in LOOPBACK:
        return False
    page = request.headers.get("origin")
    if page is not None and page.partition("://")[2] != request.url.netloc:
        return False
    # Our own HAProxy adds a line of its own to those of a client or another proxy.
    forwarded = ",".join(line for name in _FORWARDED for line in request.headers.getlist(name))
    return all(part.strip().strip('"') in {"", *LOOPBACK} for part in forwarded.split(","))


def _refusal(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)
