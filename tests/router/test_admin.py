"""Keys, teams and the audit over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from models.engines.base import Chunk, GenerationRequest
from router.access.keys import create_key
from router.cli.main import app
from tests.router.conftest import Running

# So that what is changed holds at once.
APP = {"auth": {"required": True, "cache_s": 0}}


class Admin:
    """Asks a running server with an admin's key, or with another."""

    def __init__(self, server: Running) -> None:
        self.server = server
        key, self.secret = create_key(server.ledger.database, name="root", scope="admin")
        self.key_id = key.id

    def __call__(
        self, method: str, path: str, body: object = None, secret: str | None = None
    ) -> httpx.Response:
        """Send a request; `body` is JSON, or as it is."""
        headers = {"authorization": f"Bearer {secret or self.secret}"}
        path = path if path.startswith("/v1") else f"/v1/admin{path}"
        if isinstance(body, bytes):
            return self.server.http.request(method, path, content=body, headers=headers)
        return self.server.http.request(method, path, json=body, headers=headers)

    def made(self, path: str, **body: Any) -> dict[str, Any]:
        """Make a key or a team and return it."""
        answer = self("POST", path, body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def chat(self, secret: str) -> httpx.Response:
        """Ask for an answer."""
        asked = {"model": "alpha", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
        return self("POST", "/v1/chat/completions", asked, secret)

    def flush(self) -> None:
        """Wait until the rows of what was answered are in the database."""
        self.server.settle()
        ledger, loop = self.server.ledger, self.server.loop
        asyncio.run_coroutine_threadsafe(ledger.flush(), loop).result(60)


@pytest.fixture
def admin(serve: Callable[..., Running]) -> Admin:
    """An administrator of a server that asks for keys."""
    return Admin(serve(app=APP))


def test_a_key_lives_from_its_making_to_its_end(admin: Admin) -> None:
    """Its secret is shown once and works until it is revoked; caps are set, changed, taken away."""
    made = admin.made("/keys", name="ann", caps={"tokens_per_day": 5000})
    secret = made.pop("secret")
    assert made["object"] == "key" and made["caps"] == {"tokens_per_day": 5000}
    listed = admin("GET", "/keys")
    assert made in listed.json()["data"] and secret not in listed.text
    assert admin.chat(secret).status_code == 200
    admin.flush()
    changed = admin("POST", f"/keys/{made['id']}", {"caps": {"requests_per_day": 2}}).json()
    assert changed["caps"] == {"tokens_per_day": 5000, "requests_per_day": 2}
    assert admin.chat(secret).status_code == 200
    refused = admin.chat(secret)
    assert refused.status_code == 429 and "2 requests per day" in refused.text
    caps = {"requests_per_day": None}
    assert admin("POST", "/keys/ann", {"caps": caps}).json()["caps"] == {"tokens_per_day": 5000}
    assert admin.chat(secret).status_code == 200
    gone = admin("DELETE", "/keys/ann").json()
    assert gone["revoked_s"] is not None
    assert admin("DELETE", "/keys/ann").json() == gone, "revoking twice changes nothing"
    assert admin.chat(secret).status_code == 401


def test_a_keys_weight_reaches_the_engine(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given, told and changed, and engines get it with each of the key's requests."""
    client = admin.server.service.engines["one"]
    complete, seen = client.complete, list[tuple[str, float]]()

    async def noting(request: GenerationRequest) -> Chunk:
        seen.append((request.client_id, request.client_weight))
        return await complete(request)

    monkeypatch.setattr(client, "complete", noting)
    ann = admin.made("/keys", name="ann", weight=4)
    assert ann["weight"] == 4
    admin.chat(ann["secret"])
    assert admin("POST", "/keys/ann", {"weight": 0.5}).json()["weight"] == 0.5
    admin.chat(ann["secret"])
    assert seen == [(ann["id"], 4.0), (ann["id"], 0.5)]


def test_a_teams_caps_hold_beside_its_keys(admin: Admin) -> None:
    """Two keys spend one team's budget; who spent it is in the rows; a key that leaves is free."""
    team = admin.made("/teams", name="blue", caps={"requests_per_month": 3})
    ann = admin.made("/keys", name="ann", team="blue")["secret"]
    bob = admin.made("/keys", name="bob", team=team["id"], caps={"requests_per_month": 1})["secret"]
    assert [admin.chat(key).status_code for key in (ann, bob, bob, ann)] == [200, 200, 429, 200]
    refused = admin.chat(ann)
    assert refused.status_code == 429
    assert "of the team 'blue' is exhausted" in refused.json()["error"]["message"]
    admin.server.settle()
    answered = [r for r in admin.server.ledger.records if r.status == 200]
    assert [record.team_id for record in answered] == [team["id"]] * 3
    admin("POST", "/teams/blue", {"caps": {"requests_per_month": 4}})
    assert [admin.chat(ann).status_code for _ in range(2)] == [200, 429]
    assert admin("POST", "/keys/ann", {"team": None}).json()["team"] is None
    assert admin.chat(ann).status_code == 200
    assert admin("GET", "/teams").json()["data"] == [{**team, "caps": {"requests_per_month": 4}}]


def test_a_teams_new_cap_counts_what_was_spent(admin: Admin) -> None:
    """A cap put on a team in the middle of a month finds what its keys have used in it."""
    admin.made("/teams", name="blue")
    key = admin.made("/keys", name="ann", team="blue")["secret"]
    other = admin.made("/keys", name="carl")["secret"]
    assert [admin.chat(who).status_code for who in (key, key, other)] == [200] * 3
    admin.flush()
    admin("POST", "/teams/blue", {"caps": {"requests_per_month": 3}})
    assert [admin.chat(key).status_code for _ in range(2)] == [200, 429]


def test_every_action_leaves_an_audit_row(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who, what, when, before and after; no secret; the same rows from the command line."""
    made = admin.made("/keys", name="ann")
    secret = made.pop("secret")
    admin.made("/teams", name="blue")
    admin("POST", "/keys/ann", {"team": "blue", "caps": {"usd_per_day": 5}})
    admin("POST", "/teams/blue", {"caps": {"usd_per_day": 9}})
    admin("DELETE", "/keys/ann")
    admin("DELETE", "/keys/nobody")
    answer = admin("GET", "/audit")
    rows = answer.json()["data"]
    actions = ["key.create", "team.create", "key.change", "team.change", "key.revoke"]
    assert [row["action"] for row in rows] == [*reversed(actions), "key.create"], "root's is first"
    assert {row["actor"] for row in rows[:-1]} == {admin.key_id}
    assert rows[-1]["actor"].startswith("os:")
    changed = rows[2]
    assert (changed["subject"], changed["before"]) == (made["id"], made)
    assert changed["after"] == {**made, "team": "blue", "caps": {"usd_per_day": 5}}
    assert secret not in answer.text and secret.removeprefix("sk-shoal-")[4:] not in answer.text
    times = [row["time_s"] for row in rows]
    assert times == sorted(times, reverse=True)
    page = admin("GET", f"/audit?limit=2&before_id={rows[1]['audit_id']}").json()["data"]
    assert page == rows[2:4]
    assert admin("GET", f"/audit?since_s={times[0] + 1}").json()["data"] == []
    monkeypatch.setenv("SHOAL_LEDGER", str(admin.server.ledger.database.engine.url))
    shown = CliRunner().invoke(app, ["audit"]).output
    assert 'caps: {} -> {"usd_per_day": 9.0}' in shown and admin.key_id in shown
    assert secret not in shown


def test_only_administrators_act(admin: Admin) -> None:
    """Without a key 401, with a user's 403, on every route; nothing happens."""
    user = admin.made("/keys", name="ann")["secret"]
    before = admin("GET", "/audit").json()
    paths = [
        ("POST", "/keys", {"name": "x", "scope": "admin"}), ("GET", "/keys", None),
        ("POST", "/keys/ann", {"caps": {}}), ("DELETE", "/keys/ann", None),
        ("POST", "/teams", {"name": "x"}), ("GET", "/teams", None),
        ("POST", "/teams/x", {"caps": {}}), ("GET", "/audit", None),
    ]  # fmt: skip
    for method, path, body in paths:
        assert admin(method, path, body, user).status_code == 403, path
        anonymous = admin.server.http.request(method, f"/v1/admin{path}", json=body)
        assert anonymous.status_code == 401, path
        assert anonymous.json()["error"]["code"] == "invalid_api_key"
    assert admin("GET", "/audit").json() == before


@pytest.mark.parametrize(("access", "status"), [("key", 401), ("anyone", 401), ("loopback", 200)])
def test_a_page_open_to_everybody_makes_no_administrators(
    serve: Callable[..., Running], access: str, status: int
) -> None:
    """Without keys only this machine may act, where the dashboard's figures are its too."""
    server = serve(app={"dashboard": {"access": access}})
    made = server.http.post("/v1/admin/keys", json={"name": "x", "scope": "admin"})
    assert made.status_code == status
    if status == 200:
        assert server.http.get("/v1/admin/audit").json()["data"][0]["actor"] == "anonymous"
        foreign = server.http.post(
            "/v1/admin/keys", content='{"name": "y"}', headers={"content-type": "text/plain"}
        )
        assert foreign.status_code == 415


REFUSED: list[tuple[str, Any, int, str | None]] = [
    ("/keys", {}, 400, "name"),
    ("/keys", {"name": " "}, 400, "name"),
    ("/keys", {"name": "root"}, 409, "name"),
    ("/keys", {"name": "x", "scope": "king"}, 400, "scope"),
    ("/keys", {"name": "x", "team": "nowhere"}, 404, "team"),
    ("/keys", {"name": "x", "weight": 0}, 400, "weight"),
    ("/keys/root", {"weight": 101}, 400, "weight"),
    ("/keys", {"name": "x", "caps": {"usd_per_week": 1}}, 400, "caps"),
    ("/keys", {"name": "x", "caps": {"usd_per_day": -1}}, 400, "caps"),
    ("/keys", {"name": "x", "caps": {"usd_per_day": None}}, 400, "caps.usd_per_day"),
    ("/keys", {"name": "x", "secret": "sk-shoal-mine"}, 400, "secret"),
    ("/keys", b"not json", 400, None),
    ("/keys/nobody", {"caps": {}}, 404, "key"),
    ("/keys/root", {"caps": {"usd_per_week": None}}, 400, "caps"),
    ("/keys/root", {"name": "boss"}, 400, "name"),
    ("/teams/nowhere", {"caps": {}}, 404, "team"),
    ("/teams", {"name": "x", "caps": {"usd_per_day": 1e300}}, 400, "caps"),
]


def test_what_cannot_be_is_refused_by_name(admin: Admin) -> None:
    """Errors have OpenAI's shape and name the field; nothing is made or noted."""
    for path, body, status, param in REFUSED:
        answer = admin("POST", path, body)
        assert answer.status_code == status, (path, body, answer.text)
        assert answer.json()["error"]["param"] == param, (path, body)
    assert len(admin("GET", "/audit").json()["data"]) == 1, "root's own making"
