"""Nothing that is secret is told: one grep over all that a server says and keeps."""

from __future__ import annotations

import hashlib
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from router.access.keys import create_key
from router.cli.main import app
from router.ledger.database import open_database
from tests.models.engines.remote.bad_server import BadServer, Reply
from tests.router.conftest import Running, write_pool
from tests.router.upstream import front_server, other_server  # noqa: F401 (fixtures)
from tests.server import serving, until

PROMPT = "the-prompt-is-nobodys-business"
USER = "alice-who-asks"
PASSWORD = "s3cret-pass-word"
UNKNOWN = "sk-shoal-" + "u" * 43
POOL: dict[str, Any] = {
    "engines": [
        {
            "name": "one",
            "kind": "fake",
            "options": {"models": {"broken": {"fail_after_tokens": 1}}, "context_tokens": 512},
        }
    ],
    "models": [{"name": "alpha", "engine": "one"}, {"name": "broken", "engine": "one"}],
    "policies": {"auto": {"kind": "fixed", "plan": "alpha"}},
}
CONFIG: dict[str, Any] = {
    "auth": {"required": True, "cache_s": 0},
    "budgets": {"server": {"requests_per_day": 1000}, "wait_s": 0.2},
    "logs": {"format": "json", "level": "INFO", "requests": True},
    "ledger": {"url": "sqlite:///rows.db", "flush_interval_s": 0.05},
}


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _provoke(url: str, secret: str) -> list[int]:
    """Ask in every way that is answered, refused or breaks; return the statuses."""
    said = {"role": "user", "content": PROMPT}
    chat = {"model": "alpha", "messages": [said], "user": USER}
    path = "/v1/chat/completions"
    asked: list[tuple[str, dict[str, Any] | bytes]] = [
        (path, chat),
        (path, {**chat, "stream": True}),
        (path, {**chat, "model": "broken"}),
        (path, {**chat, "model": "broken", "stream": True}),
        (path, {**chat, "model": "no-such-model"}),
        (path, {**chat, "messages": [{"role": PROMPT, "content": PROMPT}]}),
        (path, {**chat, "messages": [{"role": "user", "content": PROMPT * 1000}]}),
        (path, {**chat, "temperature": PROMPT}),
        (path, {**chat, "tools": [{"type": PROMPT}], "tool_choice": PROMPT}),
        (path, {**chat, "response_format": {"type": PROMPT}}),
        (path, {**chat, "shoal": {"policy": PROMPT}}),
        (path, {**chat, "shoal": {"plan": {PROMPT: 1}}}),
        (path, f'{{"model": "alpha", "messages": ["{PROMPT}'.encode()),
        ("/v1/completions", {"model": "alpha", "prompt": PROMPT}),
        ("/v1/responses", {"model": "alpha", "input": PROMPT}),
        ("/v1/messages", {"model": "alpha", "messages": [said], "max_tokens": 5}),
        ("/v1/messages/count_tokens", {"model": "alpha", "messages": [said]}),
        ("/tokenize", {"model": "alpha", "prompt": PROMPT}),
        ("/v1/feedback", {"id": PROMPT, "label": PROMPT}),
        (f"/v1/{PROMPT}", chat),
    ]
    statuses = []
    with httpx.Client(base_url=url, timeout=60) as http:
        for key in (secret, UNKNOWN):
            for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
                for where, body in asked:
                    content = {"content": body} if isinstance(body, bytes) else {"json": body}
                    answer = http.post(where, headers=headers, **content)  # type: ignore[arg-type]
                    statuses.append(answer.status_code)
    return statuses


def _kept(file: Path) -> str:
    """Return every row of every table but that of the keys, which holds their hashes."""
    with closing(sqlite3.connect(file, timeout=60)) as connection:
        names = [
            name
            for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        assert {"api_keys", "requests"} <= set(names)
        return "".join(
            str(connection.execute(f'SELECT * FROM "{name}"').fetchall())
            for name in names
            if name != "api_keys"
        )


@pytest.mark.slow
def test_no_secret_is_told_or_kept(tmp_path: Path) -> None:
    """Keys, their hashes, prompts and users' names stand in no log line, metric or row.

    Neither while all goes well, nor for requests that are refused, nor while the table of the keys
    is away, when the database's own error shows what was asked.
    """
    file = tmp_path / "rows.db"
    database = open_database(f"sqlite:///{file}")
    _, secret = create_key(database, name="app")
    _, admin = create_key(database, name="boss", scope="admin")
    database.dispose()
    with serving(tmp_path, "--local", config=CONFIG, **POOL) as server:
        statuses = _provoke(server.url, secret)
        assert {200, 400, 401, 404, 503} <= set(statuses)
        headers = {"authorization": f"Bearer {admin}"}
        told = "".join(
            httpx.get(server.url + path, headers=headers).text
            for path in ("/metrics", "/health", "/dashboard/data", "/v1/experiments")
        )
        with closing(sqlite3.connect(file, timeout=60)) as connection:
            connection.execute("ALTER TABLE api_keys RENAME TO gone")
            connection.commit()
            assert set(_provoke(server.url, secret)) == {404, 503}, "404: there is no such path"
            connection.execute("ALTER TABLE gone RENAME TO api_keys")
            connection.commit()
        until(lambda: _provoke(server.url, secret)[0] == 200)
    said = server.text
    assert '"status": 200' in said or '"status":200' in said, "the log tells of requests"
    assert "does not answer" in said, "the log tells of the database"
    for where, text in (("log", said), ("page", told), ("ledger", _kept(file))):
        for what in (secret, admin, UNKNOWN, PROMPT, USER, *map(_sha256, (secret, admin, UNKNOWN))):
            assert what not in text, f"{where} tells {what}"
    raw = b"".join(part.read_bytes() for part in tmp_path.glob("rows.db*"))
    for what in (secret, admin, UNKNOWN, PROMPT, USER):
        assert what.encode() not in raw


@pytest.mark.parametrize("status", [400, 422, 429, 500, 503])
def test_what_another_server_repeats_is_for_who_asked(
    upstream: BadServer, front: Running, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    """An error of a remote server that quotes the prompt tells the client, no log line, no row."""
    told = {"error": {"message": f"I cannot read “{PROMPT}”, {PROMPT}", "param": "messages"}}
    upstream.replies = [Reply(status, body=told)]
    front.forget()
    answer = front.post(model="big", messages=[{"role": "user", "content": PROMPT}])
    assert answer.status_code >= 400
    assert PROMPT in answer.json()["error"]["message"]
    record = front.last_record()
    assert record.stages[0]["error"]
    assert PROMPT not in repr(record) + caplog.text


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://shoal:{PASSWORD}@host:port/x",
        f"postgresql://shoal:{PASSWORD}@127.0.0.1:1/x",
        f"postgresql://shoal:{PASSWORD}@[::1/x",
        f"postgres//shoal:{PASSWORD}@host/x",
        f"nosuch://shoal:{PASSWORD}@host/x",
        f"postgresql://shoal@127.0.0.1:1/x?password={PASSWORD}",
        f"postgresql://127.0.0.1:1/x?no_such_option={PASSWORD}",
    ],
)
@pytest.mark.parametrize("command", [["serve", "--local"], ["report"]], ids=lambda c: c[0])
def test_no_password_of_a_database_is_told(
    tmp_path: Path, url: str, command: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is wrong with an address, the command ends with a line that shows no password."""
    write_pool(tmp_path, **POOL)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"pool": ".", "ledger": {"url": url}}))
    ended = CliRunner().invoke(app, [*command, "--config", str(config)])
    assert ended.exit_code != 0
    assert isinstance(ended.exception, SystemExit), "no traceback"
    assert PASSWORD not in ended.output + caplog.text
