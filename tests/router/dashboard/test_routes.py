"""Who may see the page and its figures."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from router.access.keys import create_key
from router.dashboard.routes import FOLDER, DashboardConfig, read_page
from router.ledger.database import open_database
from tests.router.conftest import Running, running

DATA = "/dashboard/data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ledger is."""
    return tmp_path_factory.mktemp("dashboard")


@pytest.fixture(scope="module")
def guarded(folder: Path) -> Iterator[Running]:
    """A server that asks for an admin's key."""
    with running(folder, app=_app(folder, dashboard={"access": "key"})) as server:
        yield server


def _app(folder: Path, **config: Any) -> dict[str, Any]:
    return {"ledger": {"url": f"sqlite:///{folder / 'shoal.db'}"}, **config}


def _bearer(folder: Path, scope: Any) -> dict[str, str]:
    database = open_database(f"sqlite:///{folder / 'shoal.db'}")
    _, secret = create_key(database, name=f"{scope}-{id(database)}", scope=scope)
    database.dispose()
    return {"authorization": f"Bearer {secret}"}


def test_figures_need_an_admins_key(guarded: Running, folder: Path) -> None:
    """No key is 401, a user's 403, an admin's is let in; errors are in OpenAI's shape."""
    refused = guarded.http.get(DATA)
    assert refused.status_code == 401
    assert "shoal keys create --scope admin" in refused.json()["error"]["message"]
    assert guarded.http.get(DATA, headers={"authorization": "Bearer other"}).status_code == 401
    assert guarded.http.get(DATA, headers=_bearer(folder, "user")).status_code == 403
    admitted = guarded.http.get(DATA, headers=_bearer(folder, "admin"))
    assert admitted.status_code == 200
    assert admitted.headers["cache-control"] == "no-store"
    assert admitted.json()["server"]["names"][0] == "auto"


def test_an_unknown_window_is_refused_by_name(guarded: Running, folder: Path) -> None:
    """The error names the value and what is allowed."""
    admin = _bearer(folder, "admin")
    refused = guarded.http.get(DATA, params={"window": "1y"}, headers=admin)
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "window: '1y' is not one of 15m, 1h, 24h, 7d, 30d"


def test_files_are_open_and_say_nothing(guarded: Running) -> None:
    """The page and all it loads need no key, come with a strict policy, and are cached by tag."""
    page = guarded.http.get("/dashboard")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    again = guarded.http.get("/dashboard", headers={"if-none-match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    for name in read_page():
        assert guarded.http.get(f"/dashboard/{name}").status_code == 200


@pytest.mark.parametrize(
    "path", ["missing.js", "../routes.py", "..%2froutes.py", "vendor/LICENSE.uPlot", "vendor"]
)
def test_nothing_else_can_be_fetched(guarded: Running, path: str) -> None:
    """Only the page's own files are there."""
    assert guarded.http.get(f"/dashboard/{path}").status_code == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "shoal.example.com"}, 421),
        ({"host": "127.0.0.1.example.com"}, 421),
        ({"x-forwarded-for": "203.0.113.9"}, 401),
        ({"x-forwarded-for": "127.0.0.1, 203.0.113.9"}, 401),
        ([("x-forwarded-for", "127.0.0.1"), ("x-forwarded-for", "203.0.113.9")], 401),
        ({"forwarded": "for=203.0.113.9"}, 401),
        ({"x-real-ip": "127.0.0.1"}, 200),
    ],
)
def test_on_loopback_only_this_machine_needs_no_key(
    serve: Callable[..., Running], tmp_path: Path, headers: Any, status: int
) -> None:
    """Another name (DNS rebinding) or a proxy's stranger is asked for a key."""
    server = serve(app=_app(tmp_path, dashboard={"access": "loopback"}))
    assert server.http.get(DATA, headers=headers).status_code == status


def test_keys_are_asked_for_on_loopback_where_they_are_required(
    serve: Callable[..., Running], tmp_path: Path
) -> None:
    """`auth.required` holds for the dashboard as for everything else."""
    app = _app(tmp_path, dashboard={"access": "loopback"}, auth={"required": True})
    server = serve(app=app)
    assert server.http.get(DATA).status_code == 401
    assert server.http.get(DATA, headers=_bearer(tmp_path, "admin")).status_code == 200


def test_it_can_be_left_to_a_proxy_or_switched_off(
    serve: Callable[..., Running], tmp_path: Path
) -> None:
    """`anyone` asks nobody; `enabled: false` leaves no route."""
    behind = serve(app=_app(tmp_path, dashboard={"access": "anyone"}))
    assert behind.http.get(DATA, headers={"host": "shoal.example.com"}).status_code == 200
    off = serve(app=_app(tmp_path, dashboard={"enabled": False}))
    assert off.http.get("/dashboard").status_code == 404


def test_what_the_file_says_wins_over_where_the_server_listens() -> None:
    """Loopback opens the page only where the configuration leaves it to that."""
    unsaid, said = DashboardConfig(), DashboardConfig(access="key")
    assert unsaid.listening_on("127.0.0.1").access == "loopback"
    assert unsaid.listening_on("0.0.0.0").access == "key"
    assert said.listening_on("127.0.0.1").access == "key"


def test_the_chart_library_has_its_licence_beside_it() -> None:
    """What is vendored says whose it is."""
    licence = (FOLDER / "vendor" / "LICENSE.uPlot").read_text()
    assert "Permission is hereby granted" in licence
    assert "uPlot (v1.6.32)" in (FOLDER / "vendor" / "uPlot.iife.min.js").read_text()[:200]


def test_who_leaves_is_simulated_nothing(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page elsewhere that asks a hundred times, and is closed, keeps no core busy for hours."""
    begun, go_on = [], threading.Event()

    def simulate(*_: object) -> None:
        begun.append(1)
        go_on.wait(60)

    monkeypatch.setattr("router.ingress.last_week", simulate)
    server = serve()
    at = urlsplit(server.url)
    asking = [socket.create_connection((at.hostname, at.port)) for _ in range(50)]
    for one in asking:
        one.sendall(b"GET /dashboard/target?amount=1 HTTP/1.1\r\nHost: localhost\r\n\r\n")
    server.wait(lambda: bool(begun) and len(server.server.server_state.tasks) == len(asking))
    for one in asking:
        one.close()
    server.wait(lambda: len(server.server.server_state.tasks) == 1)
    go_on.set()
    server.settle()
    assert len(begun) == 1
