"""What web pages from elsewhere may send to a server that asks for no key."""

from collections.abc import Callable
from typing import Any

import pytest

Serve = Callable[..., Any]
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/feedback")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
)
def test_posts_that_a_page_may_send_unasked_are_refused(server: Any, path: str, kind: str) -> None:
    """A body of a kind that browsers send without asking first is no request."""
    answer = server.http.post(path, content=b"{}", headers={"content-type": kind})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    unnamed = server.http.post(path, content=b"{}", headers={"origin": "https://elsewhere.example"})
    assert unnamed.status_code == 415
    assert server.http.post(path, content=b"{}").status_code == 400, "a program, not a page"


@pytest.mark.parametrize(
    "host",
    [
        "elsewhere.example",
        "127.0.0.1.elsewhere.example",
        "localhost.",
        "printer.local",
        "10.0.0.1",
        "0.0.0.0",
        "[::1",
        "[fe80::1]",
        "localhost, intranet",
        "",
    ],
)
def test_other_names_are_refused(server: Any, host: str) -> None:
    """A name that somebody else pointed at this machine opens nothing."""
    for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", PATHS[0])):
        answer = server.http.request(method, path, json={}, headers={"host": host})
        assert answer.status_code == 421
    for mine in (
        "localhost",
        "LOCALHOST:80",
        "127.0.0.1:8000",
        "127.8.0.1",
        "[::1]:8000",
        "shoal:80",
    ):
        assert server.http.get("/v1/models", headers={"host": mine}).status_code == 200


def test_the_operator_names_what_else_it_goes_by(serve: Serve) -> None:
    """Of names in `hosts` any may be used; loopback's own and plain ones stay."""
    server = serve(app={"hosts": ["shoal.example"]})
    names = (("shoal", 200), ("shoal.example:80", 200), ("localhost", 200), ("x.example", 421))
    for name, status in names:
        assert server.http.get("/v1/models", headers={"host": name}).status_code == status, name


def test_whoever_brings_a_key_may_use_any_name(serve: Serve) -> None:
    """Where keys are required a proxy in front may pass on its own name."""
    strict = serve(app={"auth": {"required": True}})
    answer = strict.http.get("/v1/models", headers={"host": "shoal.example"})
    assert answer.status_code == 401


def test_figures_of_all_users_need_an_admins_key_everywhere(serve: Serve) -> None:
    """Metrics, experiments and shadows are as closed as the dashboard's figures."""
    closed = serve(app={"dashboard": {"access": "key"}})
    for path in ("/dashboard/data", "/metrics", "/v1/experiments", "/v1/shadows"):
        assert closed.http.get(path).status_code == 401, path
