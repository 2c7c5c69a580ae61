"""Bodies on their way have bounded room: who sends too much at once is refused, others are not."""

import json
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
from hypothesis import given
from hypothesis import strategies as st

from router.access.keys import create_key
from router.bodies import Room
from router.errors import ApiError
from tests.router.conftest import Running
from tests.router.test_bodies import ENDPOINTS

KIB = 1024


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 300_000)), max_size=60))
def test_who_comes_next_always_finds_room(bodies: list[tuple[str, int]]) -> None:
    """Whatever some senders take, a new one may have half of what is free, and all comes back."""
    room, taken = Room(2_000_000), []
    for sender, num_bytes in bodies:
        try:
            room.take(sender, num_bytes)
        except ApiError as error:
            assert error.status in (429, 503)
            assert "retry-after" in error.headers
        else:
            taken.append((sender, num_bytes))
        assert room.num_bytes == sum(size for _, size in taken)
    assert room.num_bytes <= 1_500_000, "three senders leave a quarter"
    free = room.max_bytes - room.num_bytes
    room.take("new", free // 2)
    for sender, num_bytes in [*taken, ("new", free // 2)]:
        room.give(sender, num_bytes)
    assert room.num_bytes == 0


def _half_sent(server: Running, path: str, secret: str, num_bytes: int = 0) -> socket.socket:
    """Return a connection that has sent a body's beginning, and does not go on."""
    url = urlsplit(server.url)
    kind, body = "application/json", '{"model":"' + num_bytes * "x"
    if path == "/v1/files":
        kind = "multipart/form-data; boundary=x"
        body = '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + body
    connection = socket.create_connection((url.hostname or "", url.port or 0), timeout=60)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {secret}\r\n"
        f"Content-Type: {kind}\r\nContent-Length: {len(body) + 1000}\r\n\r\n"
    )
    connection.sendall((head + body).encode())
    return connection


def _asks(server: Running, secret: str, num_bytes: int = 0) -> int:
    body = json.dumps({"model": "alpha", "messages": [{"role": "user", "content": "x"}]})
    told = server.http.post(
        "/v1/chat/completions",
        content=body + num_bytes * " ",
        headers={"authorization": f"Bearer {secret}", "content-type": "application/json"},
    )
    return told.status_code


def _answer(connection: socket.socket, end: bytes) -> bytes:
    told = b""
    while end not in told:
        told += connection.recv(4096) or end
    return told


def test_half_sent_bodies_take_their_senders_share(serve: Callable[..., Running]) -> None:
    """One key's bodies that never end harm that key alone, and leave nothing behind."""
    server = serve(limits={"max_arriving_mb": 1}, app={"auth": {"required": True}})
    database = server.ledger.database
    (_, own), (_, other) = (
        create_key(database, name=name, scope="admin") for name in ("own", "other")
    )
    room = server.service.bodies.room
    for path in (*ENDPOINTS, "/v1/files"):  # what administrators send is short
        sends = []
        while room.num_bytes < 400 * KIB:
            before = room.num_bytes
            sends.append(_half_sent(server, path, own, 100 * KIB))
            server.wait(lambda before=before: room.num_bytes >= before + 100 * KIB)
        sends.append(_half_sent(server, path, own, 200 * KIB))
        told = _answer(sends[-1], b"one after another")
        assert told.startswith(b"HTTP/1.1 429"), (path, told)
        assert b"retry-after: 1" in told.lower()
        assert b"limits.max_arriving_mb" in told
        assert _asks(server, own, 200 * KIB) == 429
        assert _asks(server, own) == 200, "what is short finds room in any case"
        assert _asks(server, other, 200 * KIB) == 200
        for connection in sends:
            connection.close()
        server.wait(lambda: room.num_bytes == 0)
        assert _asks(server, own, 200 * KIB) == 200


def test_thousands_that_stop_after_a_little_deny_nobody(serve: Callable[..., Running]) -> None:
    """Many clients may have one address, that of a proxy: theirs are not all refused for some."""
    server = serve(limits={"max_arriving_mb": 1}, app={"auth": {"required": True}})
    _, secret = create_key(server.ledger.database, name="own", scope="admin")
    room = server.service.bodies.room
    sends = [_half_sent(server, "/v1/chat/completions", secret, 10 * KIB) for _ in range(200)]
    server.wait(lambda: room.num_bytes >= 200 * 10 * KIB)
    assert _asks(server, secret, 10 * KIB) == 200
    assert _asks(server, secret, 100 * KIB) == 429
    for connection in sends:
        connection.close()
    server.wait(lambda: room.num_bytes == 0)


def test_every_end_gives_the_room_back(serve: Callable[..., Running]) -> None:
    """Refused, wrong, long, packed, slow and answered bodies hold nothing afterwards."""
    server = serve(limits={"max_arriving_mb": 4, "max_body_bytes": 200_000, "body_timeout_s": 0.3})
    http, room = server.http, server.service.bodies.room

    def post(path: str, **sent: Any) -> int:
        return http.post(path, **sent).status_code

    for path, body in ENDPOINTS.items():
        for sent in (
            {"json": body},
            {"content": b"{"},
            {"content": b"x" * 300_000},
            {"content": b"x", "headers": {"content-encoding": "gzip"}},
            {"json": {**body, "shoal": {"policy": "none"}, "stream": True}},
        ):
            assert post(path, **sent) < 500
    form: dict[str, Any] = {"files": {"file": ("a", b"x" * 50_000)}}
    assert post("/v1/files", **form, data={"purpose": "batch"}) == 200
    assert post("/v1/files", **form, data={"purpose": "other"}) == 400
    assert post("/v1/files", content=b"x", headers={"content-type": "multipart/form-data"}) == 400
    for path in (*ENDPOINTS, "/v1/files"):
        with _half_sent(server, path, "none") as slow:
            assert b" 408 " in _answer(slow, b" 408 ")
    server.wait(lambda: room.num_bytes == 0)


def test_uploads_take_turns_at_the_database(serve: Callable[..., Running]) -> None:
    """However many files are written at once, calls of others find the database free."""
    server = serve()
    calls, most = server.ledger.database.calls, 0

    def upload(index: int) -> int:
        nonlocal most
        file = (f"{index}", b"x" * 600_000)
        with httpx.Client(base_url=server.url, timeout=120) as http:
            told = http.post("/v1/files", files={"file": file}, data={"purpose": "batch"})
        most = max(most, calls.num_waiting)
        return told.status_code

    with ThreadPoolExecutor(16) as clients:
        assert set(clients.map(upload, range(32))) == {200}
    assert most <= 4
