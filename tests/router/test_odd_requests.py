"""Paths, queries, headers and forms as nobody means them, at every endpoint, on both databases."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.router.conftest import Running, running

NUL = "a\0b"
# As they stand in a URL.
ODD = ("%00", "a%00b", "%ff", "%ED%A0%80", "%F0%9F%98%80", "%2e%2e%2f", "9" * 5000, "-1", "nan",
       "1e400", "%D9%A3", "%C2%B2", "x" * 5000, "")  # fmt: skip
HEADERS: tuple[dict[str, bytes], ...] = (
    {"origin": b"http://["},
    {"origin": b"http://[::1"},
    {"origin": b"\xff"},
    {"accept": b"application/openmetrics-text; version=x; q=zz"},
    {"accept": b"application/openmetrics-text; version=1.0.0; escaping=zz"},
    {"authorization": b"Bearer sk-shoal-\xff"},
    {"x-api-key": b"\xff"},
    {"x-request-id": b"\xff" * 5000},
    {"x-shoal-timeout-s": b"nan"},
    {"x-shoal-timeout-s": b"9" * 5000},
    {"x-forwarded-for": b"["},
    {"forwarded": b'for="[::1'},
    {"host": b"127.0.0.1:99999999"},
    {"content-type": b"multipart/form-data"},
    {"content-encoding": b"\xff"},
    {"traceparent": b"zz"},
)
# What is looked up, or kept, by a name that the request gives.
BODIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/feedback", {"id": NUL, "thumb": "up"}),
    ("/v1/responses", {"model": "alpha", "input": "x", "previous_response_id": NUL}),
    ("/v1/responses", {"model": "alpha", "input": NUL, "metadata": {NUL: NUL}, "user": NUL}),
    ("/v1/batches", {"input_file_id": NUL, "endpoint": "/v1/chat/completions",
                     "completion_window": "24h"}),
    ("/v1/admin/keys", {"name": NUL}),
    ("/v1/admin/keys", {"name": "k", "team": NUL}),
    ("/v1/admin/teams", {"name": NUL}),
    ("/v1/chat/completions", {"model": "alpha", "user": NUL, "shoal": {"session": NUL},
                              "messages": [{"role": "user", "content": NUL}]}),
    ("/v1/load_lora_adapter", {"lora_name": NUL, "lora_path": NUL}),
)  # fmt: skip


@pytest.fixture(name="server")
def server_on_either(ledger_url: str, tmp_path: Path) -> Iterator[Running]:
    """Scripted models, and a ledger of either kind that keeps responses."""
    app = {"ledger": {"url": ledger_url}, "responses": {"store": "unless_refused"}}
    with running(tmp_path, app=app) as server:
        yield server


def test_nothing_odd_breaks_an_endpoint(server: Running) -> None:
    """No path, query, header or name is answered by a 5xx, or by no answer."""
    document = server.http.get("/openapi.json").json()
    broken: list[str] = []

    def ask(method: str, path: str, **options: Any) -> None:
        if method == "post" and "json" not in options:
            options["json"] = {}
        answer = server.http.request(method, path, **options)
        if answer.status_code >= 500:
            broken.append(f"{method} {path[:80]} {str(options)[:80]}: {answer.text[:80]}")

    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            asked = [found["name"] for found in operation.get("parameters", ()) if
                     found["in"] == "query"]  # fmt: skip
            for odd in ODD:
                if "{" in path:
                    ask(method, re.sub(r"\{[^}]*\}", odd or "-", path))
                for name in asked:
                    ask(method, f"{re.sub(r'{[^}]*}', 'x', path)}?{name}={odd}")
            if method == "get":
                for headers in HEADERS:
                    ask(method, path, headers=headers)
    for odd in ODD:
        for name in ("window", "amount", "resource", "per"):
            ask("get", f"/dashboard/{'data' if name == 'window' else 'target'}?{name}={odd}")
    for headers in HEADERS:
        for path in ("/dashboard/data", "/v1/nothing", "/v1/files"):
            ask("get", path, headers=headers)
    for path, body in BODIES:
        ask("post", path, json=body)
    assert broken == []


def _form(purpose: bytes, kind: str, server: Running) -> httpx.Response:
    body = (
        b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\n' + purpose + b"\r\n--x\r\n"
        b'content-disposition: form-data; name="file"; filename="\\u\0\xff"\r\n\r\n{}\r\n--x--\r\n'
    )
    with httpx.Client(base_url=server.url, timeout=120) as http:
        return http.post("/v1/files", content=body, headers={"content-type": kind})


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("multipart/form-data; boundary=x", 200),
        ("multipart/form-data; boundary=x; charset=UTF-8", 200),
        ("multipart/form-data; boundary=x; charset=iso-8859-1", 200),
        *(
            (f"multipart/form-data; boundary=x; {name}={codec}", 415)
            for name in ("charset", "CHARSET", "charset=utf-8; charset")
            for codec in ("punycode", '"idna"', "undefined", "unicode_escape", "hex")
        ),
        ("multipart/form-data", 400),
        ("application/json", 415),
    ],
)
def test_a_form_is_read_as_plain_text_only(shared: Running, kind: str, status: int) -> None:
    """Of Python's codecs only those are at hand that no text keeps busy, or breaks."""
    assert _form(b"batch", kind, shared).status_code == status


def test_a_form_holds_nobody_up(shared: Running) -> None:
    """While somebody sends a long text in a slow codec, a small request is answered at once."""
    kind = "multipart/form-data; boundary=x; charset=punycode"
    sending = threading.Thread(target=_form, args=(b"abc-" + b"b" * 400_000, kind, shared))
    sending.start()
    longest_s = 0.0
    while sending.is_alive():
        began_s = time.monotonic()
        shared.http.get("/v1/models")
        longest_s = max(longest_s, time.monotonic() - began_s)
    assert longest_s < 5, "it took 40 s"


def test_names_that_nobody_can_print_are_refused_or_unknown(server: Running) -> None:
    """No key is made by one, and asking for one finds none, on either database."""
    refused = server.http.post("/v1/admin/keys", json={"name": NUL})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "name")
    assert server.http.get("/v1/admin/keys").json()["data"] == []
    assert server.http.delete("/v1/admin/keys/a%00b").status_code == 404
