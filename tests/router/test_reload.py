"""A running server takes up new policies, caps and limits, wholly or not at all."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from models.pool import load_pool
from router.catalog.catalog import load_catalog
from router.config import AppArgs, ConfigError, load_args
from router.editions import Edition, Editions
from router.ledger.database import Database, open_database
from tests.router.conftest import Running, write_pool
from tests.server import serving, until

Policies = dict[str, dict[str, Any]]


def _auto(model: str) -> Policies:
    return {"auto": {"kind": "fixed", "plan": model}}


def _reload(server: Running) -> httpx.Response:
    return server.http.post("/v1/admin/reload")


def _answered_by(server: Running) -> list[str]:
    answer = server.post(model="auto")
    assert answer.status_code == 200, answer.text
    found: list[str] = answer.json()["shoal"]["members"]
    return found


@pytest.fixture
def open_server(serve: Callable[..., Running]) -> Running:
    """A server whose own machine may act without a key, and whose answers take their time."""
    engines = [
        {"name": "one", "kind": "fake", "options": {"token_latency_s": 0.02}},
        {"name": "two", "kind": "fake", "options": {}},
    ]
    return serve(app={"dashboard": {"access": "loopback"}}, engines=engines)


def test_new_requests_follow_and_running_ones_finish(open_server: Running, tmp_path: Path) -> None:
    """A stream that began with one model ends with it; the next request gets the new policy's."""
    engines = yaml.safe_load((tmp_path / "pool.yaml").read_text())["engines"]
    text = "word " * 30
    stream = open_server.chat(text, model="auto", stream=True)
    next(iter(stream))
    policies = {**_auto("gamma"), "fresh": {"kind": "fixed", "plan": "alpha"}}
    write_pool(tmp_path, engines=engines, policies=policies)
    reloaded = _reload(open_server)
    assert reloaded.status_code == 200, reloaded.text
    assert reloaded.json()["number"] == 2 and "fresh" in reloaded.json()["policies"]
    assert _answered_by(open_server) == ["gamma"]
    assert open_server.post(model="policy/fresh").status_code == 200
    said = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert said.strip()
    open_server.settle()
    told = {(r.answered_by, r.edition, r.status) for r in open_server.ledger.records}
    assert told == {("beta", 1, 200), ("gamma", 2, 200), ("alpha", 2, 200)}
    assert open_server.http.get("/v1/admin/edition").json() == reloaded.json()
    rows = open_server.http.get("/v1/admin/audit").json()["data"]
    assert [(row["action"], row["actor"]) for row in rows] == [("reload", "anonymous")]
    assert rows[0]["after"]["pool"]["policies"] == policies


def test_a_file_that_cannot_be_used_changes_nothing(open_server: Running, tmp_path: Path) -> None:
    """Each mistake is 400 with its place, and so is what cannot change while a server runs."""
    engines = yaml.safe_load((tmp_path / "pool.yaml").read_text())["engines"]
    models = yaml.safe_load((tmp_path / "pool.yaml").read_text())["models"]
    dear = [{**models[0], "usd_per_million_input_tokens": 9}, *models[1:]]
    slow = [{**engines[0], "options": {"token_latency_s": 9}}, engines[1]]
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"policies": _auto("delta")}, "policies.auto: the policy names the model 'delta'"),
        ({"policies": {"auto": {"kind": "fixd"}}}, "fixd"),
        ({"engines": slow}, "engines.one cannot change while the server runs"),
        ({"models": dear}, "models.alpha cannot change while the server runs"),
        ({"models": models[:2], "engines": engines[:1]}, "engines.two cannot change"),
        ({"colour": "red"}, "colour: unknown key"),
    ]
    for changes, told in mistakes:
        write_pool(tmp_path, **{"engines": engines, "policies": _auto("gamma"), **changes})
        refused = _reload(open_server)
        assert refused.status_code == 400, (changes, refused.text)
        error = refused.json()["error"]
        assert error["code"] == "reload_refused" and told in error["message"], error
    (tmp_path / "pool.yaml").write_text("{")
    assert "not valid YAML" in _reload(open_server).json()["error"]["message"]
    assert _answered_by(open_server) == ["beta"]
    assert open_server.http.get("/v1/admin/edition").json()["number"] == 1
    assert open_server.http.get("/v1/admin/audit").json()["data"] == []


def test_every_replica_comes_to_the_same(tmp_path: Path) -> None:
    """One replica reloads, another follows, a third that starts later has it; other servers not."""
    args = AppArgs(pool=write_pool(tmp_path))
    database = open_database(f"sqlite:///{tmp_path}/shoal.db")
    ours, others = args.started(), args.started()
    first, second, foreign = (_replica(one, database) for one in (ours, ours, others))
    seen: list[int] = []
    second.followers.append(lambda edition: seen.append(edition.number))
    write_pool(tmp_path, policies=_auto("gamma"))

    async def reload() -> None:
        await first.reload()
        for replica in (second, second, foreign):
            await replica.follow()

    asyncio.run(reload())
    # What is on the disk meanwhile is not yet what was checked.
    write_pool(tmp_path, policies=_auto("alpha"))
    third = _replica(ours, database)
    numbers = [replica.current.number for replica in (first, second, third, foreign)]
    assert numbers == [2, 2, 2, 1] and seen == [2]
    for replica in (first, second, third):
        [plan] = replica.current.catalog.policies["auto"].plans()
        assert plan.members == ("gamma",)  # type: ignore[union-attr]
        assert replica.current.loaded_s == first.current.loaded_s
    database.dispose()


def _replica(args: AppArgs, database: Database) -> Editions:
    catalog = load_catalog(load_pool(args.pool))
    return Editions(Edition(number=1, loaded_s=0.0, args=args, catalog=catalog), database)


def test_a_configuration_changes_only_where_it_may(tmp_path: Path) -> None:
    """Policies, limits and budgets are read anew; any other section is refused by its name."""
    write_pool(tmp_path)
    file = tmp_path / "shoal.yaml"
    content: dict[str, Any] = {"pool": "pool.yaml", "auth": {"required": True}}
    file.write_text(yaml.safe_dump(content))
    args = load_args(file).listening_on("0.0.0.0").started()
    changed = {
        "policies": _auto("gamma"),
        "limits": {"default_max_tokens": 7},
        "budgets": {"server": {"usd_per_day": 3}},
    }
    file.write_text(yaml.safe_dump({**content, **changed}))
    again = args.read_again()
    assert again.policies == changed["policies"]
    assert again.limits.default_max_tokens == 7
    assert again.budgets.server == {"usd_per_day": 3}
    assert (again.server, again.auth, again.hosts) == (args.server, args.auth, args.hosts)
    for name, value in (
        ("auth", {"required": False}), ("ingress", {"min_replicas": 2}), ("num_threads", 3),
    ):  # fmt: skip
        file.write_text(yaml.safe_dump({**content, **changed, name: value}))
        with pytest.raises(ConfigError, match=f"shoal.yaml: {name} cannot change"):
            args.read_again()
    file.write_text(yaml.safe_dump({**content, "budgets": {"lease_s": 99}}))
    with pytest.raises(ConfigError, match=r"budgets\.lease_s cannot change"):
        args.read_again()


@pytest.mark.slow
def test_a_hangup_reloads(tmp_path: Path) -> None:
    """SIGHUP to `shoal serve` puts a new cap in force, or says in one line why it cannot."""
    with serving(tmp_path, "--local") as server:
        config = tmp_path / "config.yaml"
        content = yaml.safe_load(config.read_text())
        config.write_text(yaml.safe_dump({**content, "budgets": {"server": {"usd_per_dy": 1}}}))
        server.process.send_signal(signal.SIGHUP)
        until(lambda: "nothing was reloaded: " in server.text)
        assert "usd_per_dy" in server.text and "Traceback" not in server.text
        caps = {"budgets": {"server": {"requests_per_month": 0}}}
        config.write_text(yaml.safe_dump({**content, **caps}))
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.text.count("edition 2 is in force") == 2)  # said, and taken up
        assert server.ask("auto").status_code == 429
