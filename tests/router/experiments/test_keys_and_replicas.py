"""Whose feedback counts, who reads reports, and that replicas agree."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx

from models.engines.base import SamplingOptions
from models.pool import load_pool
from policies.base import Query
from router.access.keys import create_key
from router.catalog.catalog import load_catalog
from router.config import load_args
from router.exchange import Exchange
from router.executor.task import Prompt
from router.experiments import store
from router.experiments.experiments import Experiments, read_definitions
from router.ledger.database import open_database
from router.openai_api.endpoint import Ask
from tests.router.experiments.trial_server import EXPERIMENT, serving, write_config


def test_only_the_key_that_asked_may_rate_and_only_admins_read_reports(tmp_path: Path) -> None:
    """Another key's feedback is 404, as if there were no such response; reports need an admin."""
    config = write_config(tmp_path, experiments={"e": EXPERIMENT}, auth={"required": True})
    with serving(config) as trial:
        secrets = {
            name: create_key(trial.ledger.database, name=name, scope=scope)[1]
            for name, scope in (("ann", "user"), ("bob", "user"), ("root", "admin"))
        }

        def send(key: str, method: str, path: str, body: object = None) -> httpx.Response:
            header = {"authorization": f"Bearer {secrets[key]}"}
            return trial.http.request(method, path, json=body, headers=header)

        asked = {"model": "auto", "messages": [{"role": "user", "content": "x"}], "user": "u"}
        answer = send("ann", "POST", "/v1/chat/completions", asked).json()
        feedback = {"id": answer["id"], "thumb": "up"}
        assert trial.http.post("/v1/feedback", json=feedback).status_code == 401
        assert send("bob", "POST", "/v1/feedback", feedback).status_code == 404
        assert send("ann", "POST", "/v1/feedback", feedback).status_code == 200
        assert send("ann", "GET", "/v1/experiments/e").status_code == 403
        assert send("root", "GET", "/v1/experiments/e").status_code == 200


def test_a_stop_reaches_every_replica_and_is_checked_by_one(tmp_path: Path) -> None:
    """Two replicas on one database: one claims each check, both learn of a stopped arm."""
    args = load_args(write_config(tmp_path, experiments={"e": EXPERIMENT}))
    pool = load_pool(args.pool)
    definitions, _ = read_definitions(args)
    assert args.ledger is not None
    database = open_database(args.ledger.url)
    first, second = (
        Experiments(
            definitions, args=args, pool=pool, catalog=load_catalog(pool), database=database,
            clock=lambda: 1000.0,
        )
        for _ in range(2)
    )  # fmt: skip
    claims = [
        store.claim_check(database, "e", now_s=now_s, interval_s=10)
        for now_s in (1000.0, 1001.0, 1009.0, 1011.0)
    ]
    assert claims == [True, False, False, True]
    for _ in range(2):
        store.stop_arm(database, "e", "new", reason={"metric": "usd"}, now_s=1012.0)
    state = store.load(database, "e")
    assert state is not None
    assert state.stopped == {"new": {"time_s": 1012.0, "metric": "usd"}}
    assert _policies(first) == {"small", "large"}
    for replica in (first, second):
        asyncio.run(replica.reload())
        assert _policies(replica) == {"small"}
    database.dispose()


def _policies(replica: Experiments) -> set[str | None]:
    """The policies that 40 users get."""
    ask = Ask(model="auto", prompts=(Prompt(text="x"),), sampling=SamplingOptions())
    return {
        replica.place(
            Exchange.begin(id_prefix="r", endpoint="e", headers={}),
            ask,
            Query(text="x", user=f"u{i}"),
        )
        for i in range(40)
    }
