"""API keys: made, kept, checked, revoked."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from router.access.authentication import AuthConfig, Authenticator, KeyRejected
from router.access.keys import (
    Key,
    KeysError,
    create_key,
    list_keys,
    revoke_key,
)
from router.access.limits import CapError
from router.cli.keys import app as keys_app
from router.ledger.database import Database, open_database
from router.ledger.schema import API_KEYS
from tests.clock import Clock


def _authenticate(checker: Authenticator, header: str | None, **options: str) -> Key | None:
    return asyncio.run(checker.authenticate(header, **options))


def test_a_key_is_kept_only_as_a_hash(database: Database) -> None:
    """The database holds the SHA-256 and the first characters, and nothing else of the secret."""
    key, secret = create_key(database, name="team", caps={"usd_per_day": 5})
    assert secret.startswith("sk-shoal-") and len(secret) == len("sk-shoal-") + 43
    assert secret.startswith(key.prefix) and len(key.prefix) == len("sk-shoal-") + 4
    with database.connect() as connection:
        row = connection.execute(sa.select(API_KEYS)).mappings().one()
    assert row["sha256"] == hashlib.sha256(secret.encode()).hexdigest()
    assert not any(secret in str(value) for value in row.values())
    [listed] = list_keys(database)
    assert listed == key
    assert [(cap.name, cap.limit) for cap in listed.caps] == [("usd_per_day", 5_000_000_000)]


def test_a_key_opens_and_an_unknown_one_does_not(database: Database) -> None:
    """With auth required only a key of ours passes, in the Bearer scheme, however spelt."""
    key, secret = create_key(database, name="team")
    checker = Authenticator(database, AuthConfig(required=True))
    assert _authenticate(checker, f"Bearer {secret}") == key
    assert _authenticate(checker, f"bearer  {secret}") == key
    for header in (None, "", "Bearer", "Bearer ", secret, f"Basic {secret}"):
        with pytest.raises(KeyRejected, match="No API key") as caught:
            _authenticate(checker, header)
        assert caught.value.status == 401
    for header in (
        f"Bearer {secret}x",
        "Bearer sk-shoal-" + "a" * 43,
        "Bearer sk-other",
        "Bearer ✗",
    ):
        with pytest.raises(KeyRejected, match="not known, or was revoked"):
            _authenticate(checker, header)


def test_without_auth_strangers_are_anonymous(database: Database) -> None:
    """Without auth any header passes, except one that claims to be a key of ours and is not."""
    key, secret = create_key(database, name="team")
    checker = Authenticator(database, AuthConfig())
    assert _authenticate(checker, None) is None
    assert _authenticate(checker, "Bearer unused") is None
    assert _authenticate(checker, f"Bearer {secret}") == key
    with pytest.raises(KeyRejected):
        _authenticate(checker, "Bearer sk-shoal-wrong")


def test_a_revoked_key_stops_within_seconds(database: Database) -> None:
    """A revoked key works at most for the cache's age longer, and never again."""
    key, secret = create_key(database, name="team")
    clock = Clock()
    checker = Authenticator(database, AuthConfig(required=True, cache_s=2), clock=clock)
    assert _authenticate(checker, f"Bearer {secret}") == key
    assert revoke_key(database, key.id).revoked_s is not None
    clock.now_s = 1.9
    assert _authenticate(checker, f"Bearer {secret}") == key
    clock.now_s = 2.1
    with pytest.raises(KeyRejected):
        _authenticate(checker, f"Bearer {secret}")
    first = list_keys(database)[0].revoked_s
    assert revoke_key(database, "team").revoked_s == first, "revoking twice keeps the first time"


def test_a_new_key_works_soon_after_it_was_guessed(database: Database) -> None:
    """That a key was unknown is forgotten as quickly as that it was known."""
    clock = Clock()
    checker = Authenticator(database, AuthConfig(required=True, cache_s=2), clock=clock)
    key, secret = create_key(database, name="team")
    for number in range(3):
        with pytest.raises(KeyRejected):
            _authenticate(checker, f"Bearer sk-shoal-{number}")
    assert _authenticate(checker, f"Bearer {secret}") == key


def test_the_cache_saves_queries_and_is_bounded(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A known key costs one query per cache age; guessed keys cannot fill the memory."""
    monkeypatch.setattr("router.access.authentication._MOST_CACHED", 5)
    _, secret = create_key(database, name="team")
    queries: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        queries.extend([statement] if statement.startswith("SELECT api_keys") else [])

    sa.event.listen(database.engine, "before_cursor_execute", note)
    checker = Authenticator(database, AuthConfig(required=True), clock=Clock())
    for _ in range(10):
        _authenticate(checker, f"Bearer {secret}")
    assert len(queries) == 1
    for number in range(20):
        with pytest.raises(KeyRejected):
            _authenticate(checker, f"Bearer sk-shoal-{number}")
    assert len(checker._cache) <= 5


def test_only_admins_are_admins(database: Database) -> None:
    """The scope admin needs an admin's key; only a server without auth is open to everybody."""
    _, user = create_key(database, name="user")
    admin_key, admin = create_key(database, name="root", scope="admin")
    checker = Authenticator(database, AuthConfig())
    assert _authenticate(checker, f"Bearer {admin}", scope="admin") == admin_key
    assert _authenticate(checker, f"Bearer {admin}") == admin_key
    with pytest.raises(KeyRejected, match="not an admin") as caught:
        _authenticate(checker, f"Bearer {user}", scope="admin")
    assert caught.value.status == 403
    assert _authenticate(checker, None, scope="admin") is None
    with pytest.raises(KeyRejected):
        _authenticate(Authenticator(database, AuthConfig(required=True)), None, scope="admin")


def test_bad_keys_are_refused(database: Database) -> None:
    """Names are never reused, even after revocation; unknown caps and keys are named."""
    create_key(database, name="team")
    revoke_key(database, "team")
    with pytest.raises(KeysError, match="'team' is taken"):
        create_key(database, name="team")
    with pytest.raises(KeysError, match="empty"):
        create_key(database, name=" ")
    for name in ("a\nb", "\x1b[2J", "\ud800", "\u202eetag"):
        with pytest.raises(KeysError, match="cannot be printed"):
            create_key(database, name=name)
    other, _ = create_key(database, name="other")
    with pytest.raises(KeysError, match="could be the id of another"):
        create_key(database, name=other.id)
    with pytest.raises(CapError, match="usd_per_week"):
        create_key(database, name="x", caps={"usd_per_week": 1})
    with pytest.raises(CapError, match="between 0 and"):
        create_key(database, name="x", caps={"usd_per_day": float("inf")})
    with pytest.raises(KeysError, match="no key 'nobody'"):
        revoke_key(database, "nobody")


def test_keys_from_the_command_line(
    database: Database, ledger_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Create prints the secret alone on stdout, list never, and no log holds it."""
    runner, env = CliRunner(), {"SHOAL_LEDGER": ledger_url}
    with caplog.at_level(logging.DEBUG):
        arguments = ["create", "--name", "team", "--usd-per-day", "5", "--cap", "wh_per_hour=2.5"]
        made = runner.invoke(keys_app, arguments, env=env)
        assert made.exit_code == 0, made.output
        secret = made.stdout.strip()
        checker = Authenticator(database, AuthConfig(required=True))
        key = _authenticate(checker, f"Bearer {secret}")
        listed = runner.invoke(keys_app, ["list"], env=env).output
        assert key is not None and key.id in listed and key.prefix in listed
        assert "usd_per_day=5, wh_per_hour=2.5" in listed and "active" in listed
        assert runner.invoke(keys_app, ["revoke", "team"], env=env).exit_code == 0
        assert "revoked" in runner.invoke(keys_app, ["list"], env=env).output
    assert secret not in listed and secret not in caplog.text


def test_keys_of_a_folder_are_imported_once(tmp_path: Path) -> None:
    """A mounted secret's keys work; importing again, or after a revocation, changes nothing."""
    url = f"sqlite:///{tmp_path / 'shoal.db'}"
    folder = tmp_path / "secret"
    folder.mkdir()
    (folder / "team-a").write_text(f"sk-shoal-{'a' * 32}\n")
    (folder / "boss.admin").write_text(f"sk-shoal-{'b' * 32}")
    (folder / "..data").mkdir()
    command = ["import", str(folder), "--ledger", url]
    first = CliRunner().invoke(keys_app, command)
    assert first.exit_code == 0, first.output
    database = open_database(url)
    made = {key.name: (key.id, key.scope) for key in list_keys(database)}
    assert {name: scope for name, (_, scope) in made.items()} == {"team-a": "user", "boss": "admin"}
    authenticator = Authenticator(database, AuthConfig(required=True))
    key = asyncio.run(authenticator.authenticate(f"Bearer sk-shoal-{'b' * 32}", scope="admin"))
    assert key is not None
    assert key.name == "boss"
    revoke_key(database, "team-a")
    assert "team-a: known already" in CliRunner().invoke(keys_app, command).output
    assert {key.name for key in list_keys(database) if key.revoked_s} == {"team-a"}
    (folder / "weak").write_text("sk-shoal-123")
    refused = CliRunner().invoke(keys_app, command)
    assert refused.exit_code == 1
    assert "the secret of 'weak' cannot be used" in refused.stderr
    (folder / "weak").write_text(f"sk-shoal-{'c' * 32}")
    (folder / "team-a").write_text(f"sk-shoal-{'d' * 32}")
    assert "the name 'team-a' is taken" in CliRunner().invoke(keys_app, command).stderr
    database.dispose()
