"""What clients of every kind send around their JSON: packing, types, versions, hang-ups, pages."""

import gzip
import json
import logging
import socket
import zlib
from collections.abc import Callable
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import zstandard

from router.config import AppArgs

CHAT = {"model": "alpha", "messages": [{"role": "user", "content": "hello"}]}
BODY = json.dumps(CHAT).encode()
JSON = {"content-type": "application/json"}
PATH = "/v1/chat/completions"


def _gzip_parts(body: bytes) -> bytes:
    """Return what several programs have packed one after another."""
    return gzip.compress(body[:9]) + gzip.compress(body[9:])


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "x-gzip": _gzip_parts,
    "deflate": zlib.compress,
    "zstd": zstandard.compress,
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_bodies_are_read(server: Any, packing: str) -> None:
    """A body may come packed; broken, bomb-like and unknown ones are refused as what they are."""
    headers = {**JSON, "content-encoding": packing}
    pack = PACKINGS[packing]
    assert server.http.post(PATH, content=pack(BODY), headers=headers).status_code == 200
    bomb = pack(b" " * 50_000_000)
    assert server.http.post(PATH, content=bomb, headers=headers).status_code == 413
    broken = server.http.post(PATH, content=b"no" + BODY, headers=headers)
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_encoding")
    unknown = server.http.post(PATH, content=BODY, headers={**JSON, "content-encoding": "br"})
    assert unknown.status_code == 415


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (JSON, 200),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({}, 200),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"origin": "https://evil.example"}, 415),
    ],
)
def test_no_page_can_post_unasked(server: Any, headers: dict[str, str], status: int) -> None:
    """What a page may send without a preflight is refused; a plain client need not say JSON."""
    for path, body in ((PATH, BODY), ("/v1/feedback", b"{}")):
        request = httpx.Request("POST", server.url + path, content=body, headers=headers)
        got = server.http.send(request).status_code
        assert (got == 415) == (status == 415), path


def test_pages_may_ask_where_the_operator_says_so(serve: Any, server: Any) -> None:
    """Preflights are answered for the origins in the configuration, and for no other."""
    page = "https://chat.example.org"
    asked = {"origin": page, "access-control-request-method": "POST"}
    refused = server.http.options(PATH, headers=asked)
    assert refused.status_code == 400
    assert "access-control-allow-origin" not in refused.headers
    allowing = serve(app={"http": {"cors_origins": [page]}})
    preflight = allowing.http.options(PATH, headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == page
    listing = allowing.http.get("/v1/models", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in listing.headers


@pytest.mark.parametrize("page", ["http://localhost:3000", "http://127.0.0.1", "https://[::1]:1"])
def test_this_machines_own_pages_may_ask_but_not_administer(server: Any, page: str) -> None:
    """On loopback they may ask, unless the file says which pages may; admins' figures stay shut."""
    headers = {"origin": page}
    assert server.http.post(PATH, json=CHAT, headers=headers).headers[
        "access-control-allow-origin"
    ] == page  # fmt: skip
    for path in ("/v1/admin/keys", "/dashboard/data", "/metrics"):
        assert server.http.get(path).status_code == 200
        assert server.http.get(path, headers=headers).status_code == 401
        assert server.http.get(path, headers={"origin": server.url}).status_code == 200


@pytest.mark.parametrize(
    "page",
    ["http://localhost.evil.example", "http://evil.example:3000", "null", "http://127.0.0.2"],
)
def test_a_page_that_only_looks_like_this_machines_may_not(server: Any, page: str) -> None:
    """Names that begin alike, and pages without an origin, are strangers."""
    got = server.http.get("/v1/models", headers={"origin": page})
    assert "access-control-allow-origin" not in got.headers


def test_a_server_for_others_has_no_pages_of_its_own() -> None:
    """Only where it listens on loopback are this machine's pages allowed by themselves."""
    assert AppArgs().listening_on("0.0.0.0").http.cors_origins == ()
    none = AppArgs.model_validate({"http": {"cors_origins": []}})
    assert none.listening_on("127.0.0.1").http.cors_origins == ()


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/alpha", "/metrics", "/no"])
def test_head_is_get_without_a_body(server: Any, path: str) -> None:
    """The same status and length, no body."""
    got, head = server.http.get(path), server.http.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")


def test_a_slash_too_many(server: Any) -> None:
    """Paths under /v1 may end with one."""
    assert server.http.get("/v1/models/").json()["object"] == "list"
    assert server.http.post(PATH + "/", json=CHAT).status_code == 200
    assert server.http.put(PATH, json=CHAT).status_code == 405


def _raw(server: Any, text: bytes) -> bytes:
    at = urlsplit(server.url)
    with socket.create_connection((at.hostname, at.port), timeout=30) as line:
        line.sendall(text)
        got = b""
        while part := line.recv(65536):
            got += part
    return got


@pytest.mark.parametrize("protocol", ["h2c", "websocket"])
def test_an_offer_of_another_protocol_is_declined(server: Any, protocol: str) -> None:
    """Java's HttpClient offers HTTP/2 with its first request, which is answered all the same."""
    head = (
        f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade, close\r\n"
        f"upgrade: {protocol}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(BODY)}\r\n\r\n"
    )
    answer = _raw(server, head.encode() + BODY)
    assert answer.startswith(b"HTTP/1.1 200"), answer
    assert b'"content":"hello"' in answer


def test_json_is_read_as_it_is_defined(server: Any) -> None:
    """A mark of the encoding may come first; what is no JSON number is no JSON."""
    marked = server.http.post(PATH, content=b"\xef\xbb\xbf" + BODY, headers=JSON)
    assert marked.status_code == 200
    for number in (b"NaN", b"-Infinity"):
        body = BODY[:-1] + b', "future_field": ' + number + b"}"
        error = server.http.post(PATH, content=body, headers=JSON)
        assert (error.status_code, error.json()["error"]["code"]) == (400, "invalid_json")


def test_http_10_gets_no_chunks(server: Any) -> None:
    """An old client's stream ends with the connection; its body is nothing but events."""
    body = json.dumps({**CHAT, "stream": True}).encode()
    head = f"POST {PATH} HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    told, _, rest = _raw(server, head.encode() + b"\r\n\r\n" + body).partition(b"\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 200")
    assert b"transfer-encoding" not in told.lower()
    assert rest.startswith(b"data: ")
    assert rest.endswith(b"data: [DONE]\n\n")


def test_a_hang_up_during_upload_is_the_clients(server: Any) -> None:
    """It is recorded as 499, not as an error of the server."""
    at = urlsplit(server.url)
    with socket.create_connection((at.hostname, at.port)) as half:
        half.sendall(
            f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n{{".encode()
        )
    assert server.last_record().status == 499


@pytest.mark.parametrize(
    "path", ["/v1/feedback", "/v1/files", "/v1/batches", "/v1/admin/keys", "/tokenize"]
)
def test_a_hang_up_is_no_error_anywhere(
    server: Any, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    """Nobody fills the log by going away."""
    uvicorns, tasks = logging.getLogger("uvicorn.error"), server.server.server_state.tasks
    uvicorns.addHandler(caplog.handler)
    kind = "multipart/form-data; boundary=x" if path == "/v1/files" else "application/json"
    at = urlsplit(server.url)
    try:
        with socket.create_connection((at.hostname, at.port)) as half:
            half.sendall(
                f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {kind}\r\n"
                "content-length: 1000\r\n\r\n-".encode()
            )
            server.wait(lambda: bool(tasks))
        server.wait(lambda: not tasks)
    finally:
        uvicorns.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []


def test_errors_do_not_echo_at_length(server: Any) -> None:
    """However long what was wrong is, the error is short."""
    for body in (
        {**CHAT, "model": "m" * 1_000_000},
        {**CHAT, "messages": [{"role": "r" * 1_000_000, "content": "x"}]},
        {**CHAT, "tool_choice": "t" * 1_000_000},
        {**CHAT, "shoal": {"policy": "p" * 1_000_000}},
        {**CHAT, "shoal": {"k" * 1_000_000: 1}},
    ):
        response = server.http.post(PATH, json=body)
        assert response.status_code in (400, 404)
        assert len(response.content) < 3000


def test_a_long_wait_is_bridged_by_comments(serve: Any) -> None:
    """A stream whose answer takes long begins with comments; clients skip them."""
    slow = {"time_to_first_token_s": 0.5}
    server = serve(
        engines=[{"name": "one", "kind": "fake", "options": slow}],
        models=[{"name": "alpha", "engine": "one"}],
        policies={},
        limits={"first_comment_s": 0.05, "comment_interval_s": 0.1},
    )
    with server.http.stream("POST", PATH, json={**CHAT, "stream": True}) as response:
        lines = list(response.iter_lines())
    assert lines[0].startswith(":")
    assert sum(line.startswith(":") for line in lines) > 1
    chunks = server.chat(stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello"


def test_idle_connections_stay(serve: Any) -> None:
    """For as long as the configuration says, and no longer."""
    server = serve(app={"http": {"keep_alive_s": 1}})
    line = HTTPConnection(urlsplit(server.url).netloc, timeout=30)
    line.connect()
    first = line.sock
    for _ in range(2):
        line.request("GET", "/v1/models/alpha")
        assert line.getresponse().read()
        assert line.sock is first
    assert first.recv(1) == b""
    line.close()
