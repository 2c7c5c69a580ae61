"""Keys and budgets over HTTP, with the real openai client, a real ledger and scripted engines."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import openai
import pytest
import sqlalchemy as sa
from pydantic import ValidationError

from router.access.keys import create_key, revoke_key
from router.access.store import BudgetStore
from router.config import AppArgs
from router.ledger.database import database_url, open_database
from router.ledger.queries import requests
from router.ledger.schema import BUDGET_HOLDS, BUDGET_WINDOWS
from tests.router.ledger.pgserver import postgresql

Serve = Callable[..., Any]
USER = {"role": "user", "content": "go"}


class Kept:
    """The database of a running server, from outside."""

    def __init__(self, folder: Path) -> None:
        self.url = f"sqlite:///{folder / 'shoal.db'}"
        self.database = open_database(self.url)

    def app(self, **sections: Any) -> dict[str, Any]:
        """Return a configuration that keeps its ledger here."""
        return {"ledger": {"url": self.url, "flush_interval_s": 0.01}, **sections}

    def rows(self, count: int) -> list[dict[str, Any]]:
        """Return the ledger's rows once there are `count`."""
        deadline_s = time.monotonic() + 60
        while len(rows := list(requests(self.database))) < count:
            assert time.monotonic() < deadline_s, rows
            time.sleep(0.01)
        return rows

    def spent(self, scope: str = "server") -> dict[str, int]:
        """Return the one window of `scope`, once nothing is held in it."""
        query = sa.select(BUDGET_WINDOWS).where(BUDGET_WINDOWS.c.window_id.startswith(scope))
        deadline_s = time.monotonic() + 60
        while True:
            with self.database.connect() as connection:
                [row] = connection.execute(query).mappings()
                holds = connection.execute(sa.select(BUDGET_HOLDS)).all()
            if not holds and row["held_requests"] == row["held_tokens"] == 0:
                return {k[6:]: v for k, v in row.items() if k.startswith("spent_")}
            assert time.monotonic() < deadline_s, row
            time.sleep(0.01)


@pytest.fixture
def kept(tmp_path: Path) -> Any:
    """The ledger's database, for the test's server and the test."""
    opened = Kept(tmp_path)
    yield opened
    opened.database.dispose()


def _as(server: Any, secret: str) -> openai.OpenAI:
    return server.client.with_options(api_key=secret)


def _say(client: openai.OpenAI, text: str = "hello", **fields: Any) -> Any:
    fields.setdefault("model", "alpha")
    return client.chat.completions.create(messages=[{"role": "user", "content": text}], **fields)


def test_only_keys_open_a_server_that_wants_them(kept: Kept, serve: Serve) -> None:
    """Without a known key every route says 401; health stays open; the row names the key."""
    server = serve(app=kept.app(auth={"required": True, "cache_s": 0}))
    key, secret = create_key(kept.database, name="team")
    with pytest.raises(openai.AuthenticationError) as caught:
        _say(server.client)
    assert caught.value.code == "invalid_api_key"
    assert caught.value.response.headers["www-authenticate"] == "Bearer"
    assert server.http.get("/v1/models").status_code == 401
    assert server.http.get("/v1/models/alpha").status_code == 401
    assert server.http.post("/v1/feedback", json={}).status_code == 401
    assert server.http.get("/health").status_code == 200
    client = _as(server, secret)
    assert _say(client).choices[0].message.content
    assert [model.id for model in client.models.list()]
    with pytest.raises(openai.PermissionDeniedError, match="not an admin"):
        client.get("/experiments", cast_to=object)
    revoke_key(kept.database, key.id)
    with pytest.raises(openai.AuthenticationError):
        _say(client)
    rows = kept.rows(3)
    assert [(row["status"], row["key_id"]) for row in rows] == [
        (401, None),
        (200, key.id),
        (401, None),
    ]
    assert all(secret not in str(row) for row in rows)


def test_a_spent_budget_ends_the_clients_retries(kept: Kept, serve: Serve) -> None:
    """The client gets its answers until the budget is spent, then one 429 that it doesn't retry."""
    server = serve(app=kept.app())
    _, secret = create_key(kept.database, name="team", caps={"requests_per_month": 2})
    client = _as(server, secret).with_options(max_retries=5)
    raw = client.chat.completions.with_raw_response.create(
        model="alpha", messages=[{"role": "user", "content": "hi"}]
    )
    assert raw.headers["x-ratelimit-limit-requests"] == "2"
    assert raw.headers["x-ratelimit-remaining-requests"] == "1"
    assert raw.headers["x-ratelimit-reset-requests"].endswith("s")
    _say(client)
    with pytest.raises(openai.RateLimitError) as caught:
        _say(client)
    error = caught.value
    assert error.code == "insufficient_quota"
    assert "2 requests per month of the key 'team' is exhausted" in error.message
    assert error.response.headers["x-should-retry"] == "false"
    assert int(error.response.headers["retry-after"]) > 0
    assert error.response.headers["x-ratelimit-remaining-requests"] == "0"
    assert [row["status"] for row in kept.rows(3)] == [200, 200, 429], "asked once, not six times"
    assert _say(server.client), "others have budgets of their own"


def test_what_is_charged_is_what_the_ledger_says(kept: Kept, serve: Serve) -> None:
    """Whole, streamed, several choices, fused, cascaded, refused: spend equals the rows' sums."""
    server = serve(
        app=kept.app(budgets={"server": {"usd_per_month": 1}}),
        engines=[
            {"name": "one", "kind": "fake", "options": {"models": {"beta": {"refuse": True}}}},
            {"name": "two", "kind": "fake", "options": {}},
        ],
    )
    _say(server.client, max_tokens=10)
    list(_say(server.client, "stream me", stream=True, max_tokens=7))
    _say(server.client, n=3, max_tokens=5)
    cascade = {"cascade": {"stages": ["alpha", "gamma"], "thresholds": [1.0]}}
    _say(server.client, max_tokens=4, extra_body={"shoal": {"plan": cascade}})
    with pytest.raises(openai.RateLimitError):
        _say(server.client, model="beta")
    with pytest.raises(openai.NotFoundError):
        _say(server.client, model="nobody")
    rows = kept.rows(6)
    assert sorted(row["status"] for row in rows) == [200, 200, 200, 200, 404, 429]
    spent = kept.spent()
    answered = [row for row in rows if row["status"] == 200]
    assert spent["requests"] == 4
    assert spent["tokens"] == sum(r["prompt_tokens"] + r["output_tokens"] for r in answered)
    assert spent["nano_usd"] == pytest.approx(sum(row["usd"] for row in rows) * 1e9, abs=6)
    assert spent["nano_usd"] > 0


def test_a_client_that_leaves_pays_for_what_was_written(kept: Kept, serve: Serve) -> None:
    """A stream cut off holds nothing afterwards, and is charged less than its estimate."""
    slow = {"answers": ["x" * 400], "token_latency_s": 0.5}
    server = serve(
        app=kept.app(budgets={"server": {"tokens_per_month": 500}}),
        engines=[
            {"name": "one", "kind": "fake", "options": slow},
            {"name": "two", "kind": "fake", "options": {}},
        ],
    )
    with server.http.stream(
        "POST",
        "/v1/chat/completions",
        json={
            "model": "alpha",
            "stream": True,
            "max_tokens": 400,
            "messages": [USER],
        },
    ) as response:
        assert response.status_code == 200
        list(islice((line for line in response.iter_lines() if "content" in line), 3))
    [row] = kept.rows(1)
    assert row["status"] == 499
    assert 0 < kept.spent()["tokens"] < 300
    assert _say(server.client, model="gamma", max_tokens=100)


def test_a_request_waits_for_the_one_in_flight(kept: Kept, serve: Serve) -> None:
    """What another request only holds is waited for, so that no budget is refused unused."""
    # It ends only when its client leaves.
    slow = {"answers": ["never"], "token_latency_s": 500}
    server = serve(
        app=kept.app(budgets={"server": {"tokens_per_month": 300}, "wait_s": 60}),
        engines=[
            {"name": "one", "kind": "fake", "options": slow},
            {"name": "two", "kind": "fake", "options": {}},
        ],
    )
    asked = {"model": "alpha", "stream": True, "max_tokens": 200, "messages": [USER]}
    with ThreadPoolExecutor() as pool:
        with server.http.stream("POST", "/v1/chat/completions", json=asked) as response:
            assert response.status_code == 200
            second = pool.submit(_say, server.client, model="gamma", max_tokens=200)
            server.wait(lambda: bool(server.service.budgets._waiting))
            assert not second.done()
        assert second.result(60)
    assert {row["status"] for row in kept.rows(2)} == {200, 499}


def test_text_is_kept_only_where_asked(kept: Kept, serve: Serve) -> None:
    """`keep_text` stores the last user message and the answer; without it neither is stored."""
    app = kept.app()
    app["ledger"]["keep_text"] = True
    _say(serve(app=app).client, "a secret")
    _say(serve(app=kept.app()).client, "another secret")
    first, second = kept.rows(2)
    assert first["query_text"] == "a secret" and first["answer_text"]
    assert second["query_text"] is None and second["answer_text"] is None
    assert "another secret" not in str(second)


def test_unknown_settings_are_refused() -> None:
    """A misspelt key of ledger, keys or budgets is refused at start; so is no ledger at all."""
    with pytest.raises(ValidationError, match="ledger"):
        AppArgs.model_validate({"ledger": None})
    for section in ("ledger", "auth", "budgets"):
        with pytest.raises(ValidationError, match="colour"):
            AppArgs.model_validate({section: {"colour": "red"}})


def test_a_database_that_is_away_is_told_and_comes_back(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """While it hangs keyed requests and feedback get 503 with retry-after; then all is well again.

    Requests without a key are answered throughout. No log line shows a statement's values.
    """
    with postgresql() as away:
        app = {"ledger": {"url": away.address}, "auth": {"cache_s": 0}}
        server = serve(app=app, limits={"request_timeout_s": 60})
        database = open_database(away.address)
        _, secret = create_key(database, name="team", caps={"requests_per_day": 1000})
        database.dispose()
        client = _as(server, secret)
        _say(client)
        stopped = away.processes()
        for process in stopped:
            process.suspend()
        try:
            with pytest.raises(openai.InternalServerError) as caught:
                _say(client)
            assert caught.value.status_code == 503
            assert caught.value.code == "database_unavailable"
            assert int(caught.value.response.headers["retry-after"]) >= 1
            rated = server.http.post("/v1/feedback", json={"id": "chatcmpl-1", "thumb": "up"})
            assert rated.status_code == 503
            assert server.http.get("/health").status_code == 200
            assert _say(server.client)
        finally:
            for process in stopped:
                process.resume()
        deadline_s = time.monotonic() + 60
        while True:
            try:
                assert _say(client)
                break
            except openai.InternalServerError:
                assert time.monotonic() < deadline_s, "it did not come back"
        lines = [record for record in caplog.records if "does not answer" in record.getMessage()]
        assert 1 <= len(lines) <= 4, "one per part that uses it"
        assert secret not in caplog.text and hashlib.sha256(secret.encode()).hexdigest() not in (
            caplog.text
        )
        server.server.should_exit = True
        server.wait(lambda: not server.loop.is_running())


@pytest.mark.parametrize("whole_bytes", [0, 4096], ids=["its head, too", "all but its head"])
def test_a_file_that_is_damaged_is_told_and_comes_back(
    kept: Kept, serve: Serve, caplog: pytest.LogCaptureFixture, whole_bytes: int
) -> None:
    """While the ledger's file holds rubbish what needs it gets 503; restored, all is well again."""
    server = serve(app=kept.app(auth={"required": True, "cache_s": 0}))
    _, secret = create_key(kept.database, name="team", scope="admin")
    client = _as(server, secret)
    _say(client)
    kept.rows(1)
    file = Path(kept.url.removeprefix("sqlite:///"))
    with kept.database.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    whole = file.read_bytes()
    file.write_bytes(whole[:whole_bytes] + b"\xde\xad" * ((len(whole) - whole_bytes) // 2))
    headers = {"authorization": f"Bearer {secret}"}
    for path in ("/v1/models", "/v1/files", "/v1/admin/keys", "/metrics", "/v1/experiments"):
        answer = server.http.get(path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable")
        assert int(answer.headers["retry-after"]) >= 1
    lines = [record for record in caplog.records if "database" in record.getMessage()]
    assert 1 <= len(lines) <= 6, "one per part that uses it"
    assert not any(record.exc_info or "\n" in record.getMessage() for record in lines)
    file.write_bytes(whole)
    server.wait(lambda: server.http.get("/v1/models", headers=headers).status_code == 200)
    assert _say(client)


def test_a_database_that_only_reads_is_told(serve: Serve) -> None:
    """What cannot be written now, as after a failover to a standby, is 503, not 500."""
    with postgresql() as server_of_rows:
        server = serve(app={"ledger": {"url": server_of_rows.address}})
        admin = sa.create_engine(database_url(server_of_rows.address), isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.exec_driver_sql(
                "ALTER DATABASE postgres SET default_transaction_read_only = on"
            )
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )

        def made() -> int:
            return int(server.http.post("/v1/admin/teams", json={"name": "t"}).status_code)

        assert {made() for _ in range(3)} == {503}
        with admin.connect() as connection:
            connection.exec_driver_sql("SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE")
            connection.exec_driver_sql(
                "ALTER DATABASE postgres RESET default_transaction_read_only"
            )
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
        server.wait(lambda: made() == 200)
        admin.dispose()
        server.server.should_exit = True
        server.wait(lambda: not server.loop.is_running())


def test_a_locked_database_makes_nobody_wait_long(kept: Kept, serve: Serve) -> None:
    """While another program holds the file a capped request gets 503 soon after `wait_s`."""
    server = serve(app=kept.app(budgets={"server": {"requests_per_day": 1000}, "wait_s": 0.2}))
    with kept.database.connect() as connection:
        connection.execution_options(shoal_writing=True)
        with connection.begin(), pytest.raises(openai.InternalServerError) as caught:
            _say(server.client)
    assert (caught.value.status_code, caught.value.code) == (503, "budgets_unavailable")
    deadline_s = time.monotonic() + 60
    while True:
        try:
            assert _say(server.client)
            break
        except openai.InternalServerError:
            assert time.monotonic() < deadline_s, "it did not come back"


def test_numbers_that_no_column_holds_harm_nobody(
    kept: Kept, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Absurd numbers are refused by name; what cannot be counted all the same fails alone."""
    server = serve(app=kept.app(budgets={"server": {"tokens_per_day": 10_000}}))
    for number in (2**31, 2**62, 2**63, 2**64, 10**400):
        refused = server.post(max_tokens=number)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "max_tokens"
    apply = BudgetStore.apply

    def break_down(store: BudgetStore, settles: Any, reserves: Any, now_s: float) -> Any:
        if any(reserve.amounts.tokens > 5000 for reserve in reserves):
            raise OverflowError("int too large")
        return apply(store, settles, reserves, now_s)

    monkeypatch.setattr(BudgetStore, "apply", break_down)
    with ThreadPoolExecutor(8) as clients:
        found = list(clients.map(lambda i: server.post(max_tokens=6000 if i == 4 else 5), range(8)))
    assert sorted(answer.status_code for answer in found) == [200] * 7 + [500]
    monkeypatch.setattr(BudgetStore, "sweep", None)
    server.wait(lambda: server.post() and server.service.budgets.worker.num_failures > 0)
    assert server.http.get("/health").json()["workers"]["budgets"]["failures"] > 0
    monkeypatch.undo()
    assert server.post(max_tokens=5).status_code == 200
    server.wait(lambda: server.http.get("/health").status_code == 200)
