"""Shadows: never seen by the client, paid apart, capped, and judged by the same label."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from policies.base import Decision, Query
from policies.fixed import Fixed
from router.ledger.queries import requests
from tests.router.conftest import Running
from tests.router.experiments.trial_server import Trial, serving, write_config

SHADOW = {"policy": "large", "share": 1.0, "usd_per_day": 1.0, "concurrency": 4}
SCRIPTS: dict[str, Any] = {"cheap": {"answers": ["94"]}, "dear": {"answers": ["95"]}}


def rows(trial: Trial, num: int) -> list[dict[str, Any]]:
    """The shadow's rows, once there are `num`."""
    end = time.monotonic() + 60
    while True:
        trial.flush()
        found = [r for r in requests(trial.ledger.database) if r["endpoint"] == "shadow"]
        if len(found) >= num:
            return found
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_the_mirrored_answer_is_scored_and_never_returned(tmp_path: Path) -> None:
    """The client gets the default's answer at the default's cost; a label judges both answers."""
    config = write_config(tmp_path, scripts=SCRIPTS, shadows={"next": SHADOW})
    with serving(config) as trial:
        answer = trial.ask("What is 37 + 58?", user="u", max_tokens=8)
        [mirrored] = rows(trial, 1)
        trial.rate(answer["id"], label="95")
        told = trial.http.get("/v1/shadows").json()["data"][0]
        refused = trial.rate(mirrored["request_id"], thumb="up")
    assert answer["choices"][0]["message"]["content"] == "94"
    assert list(answer["shoal"]["tokens"]) == ["cheap"]
    assert mirrored["policy"] == "large"
    assert mirrored["usd"] > 5 * answer["shoal"]["cost"]["usd"] > 0
    assert (mirrored["key_id"], mirrored["user_hash"], mirrored["arm"]) == (None, None, None)
    assert 0 < mirrored["stages"][0]["score"] <= 1
    assert (told["num_mirrored"], told["agreement"]) == (1, 0.0)
    assert (told["quality"], told["served_quality"]) == (1.0, 0.0)
    assert told["usd"] == mirrored["usd"]
    assert refused.status_code == 404


def test_the_cap_and_the_failures_stay_with_the_shadow(tmp_path: Path) -> None:
    """With no money nothing is mirrored; a shadow whose engine fails leaves clients alone."""
    broke = {**SHADOW, "usd_per_day": 0.0}
    scripts = {"dear": {"fail_after_tokens": 0}}
    config = write_config(tmp_path, scripts=scripts, shadows={"broke": broke, "broken": SHADOW})
    with serving(config) as trial:
        for _ in range(3):
            assert trial.ask("hello")["choices"][0]["message"]["content"] == "hello"
        found = rows(trial, 3)
        told = {s["name"]: s for s in trial.http.get("/v1/shadows").json()["data"]}
    assert {row["status"] for row in found} == {500}
    assert told["broke"]["num_mirrored"] == 0
    assert (told["broken"]["num_mirrored"], told["broken"]["answered"]) == (3, 0.0)


def test_a_named_model_is_not_mirrored(tmp_path: Path) -> None:
    """Only requests for the shadow's models are."""
    with serving(write_config(tmp_path, shadows={"next": SHADOW})) as trial:
        trial.ask(model="cheap")
        trial.ask(model="auto")
        rows(trial, 1)
        trial.run(trial.service.mirror.close())
        assert len(rows(trial, 1)) == 1


def test_a_budget_that_a_shadow_decides_by_is_settled(tmp_path: Path) -> None:
    """What ran costs what its row says; what the shadow's own cap kept back costs nothing."""
    target = {"resource": "usd", "amount": 1.0}
    inner = {"kind": "fixed", "plan": "dear"}
    thrifty = {"kind": "budgeted", "policy": inner, "targets": [target]}
    config = write_config(
        tmp_path,
        policies={"thrifty": thrifty},
        shadows={"once": {**SHADOW, "policy": "thrifty", "usd_per_day": 1e-4}},
    )
    with serving(config) as trial:
        for _ in range(3):
            trial.ask("hello", max_tokens=8)
        [row] = rows(trial, 1)
        spent = trial.service.catalog.policies.controllers["thrifty"].spent
        assert spent()["usd"] == pytest.approx(row["usd"], rel=1e-9)
        assert row["usd"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_shadow_that_fails_to_decide_takes_nothing_back(
    serve: Callable[..., Running], monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    """Whatever its policy raises, who was answered has the answer, and it is recorded."""
    fixed = {"kind": "fixed", "plan": "beta"}
    shadow = {"policy": "odd", "share": 1, "usd_per_day": 1}
    server = serve(
        policies={"auto": fixed, "odd": {**fixed, "plan": "gamma"}},
        app={"shadows": {"mirror": shadow}},
    )
    odd, decide = server.service.catalog.policies["odd"], Fixed.decide

    def fail(policy: Fixed, query: Query) -> Decision:
        if policy is odd:
            raise LookupError("odd")
        return decide(policy, query)

    monkeypatch.setattr(Fixed, "decide", fail)
    answer = server.post(model="auto", stream=stream)
    assert answer.status_code == 200 and not answer.text.count("error"), answer.text
    assert server.last_record().status == 200
