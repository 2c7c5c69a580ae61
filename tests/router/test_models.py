"""`/v1/models` and `/health`."""

from typing import Any

import openai
import pytest


def test_lists_everything_that_can_be_asked_for(server: Any) -> None:
    """Policies and models stand in the list, each with its facts."""
    entries = {model.id: model for model in server.client.models.list()}
    assert list(entries) == ["auto", "policy/auto", "alpha", "beta", "gamma"]
    assert entries["auto"].shoal == {"kind": "policy", "members": ["beta"]}
    assert entries["alpha"].shoal["domains"] == ["tests"]
    assert entries["alpha"].shoal["usd_per_million_output_tokens"] == 2
    for name in entries:
        server.chat(model=name)


def test_describes_one(server: Any) -> None:
    """Names with a slash are found; unknown ones are not."""
    assert server.client.models.retrieve("policy/auto").id == "policy/auto"
    assert server.client.models.retrieve("alpha").owned_by == "test-pool"
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("nobody")


def test_health_names_the_engine_that_fails(serve: Any) -> None:
    """Health is 200 while every engine serves, 503 with the reason once one does not."""
    server = serve()
    healthy = server.http.get("/health")
    assert (healthy.status_code, healthy.json()["status"]) == (200, "ok")
    server.service.engines["two"]._engine._engine._stopped = True
    failed = server.http.get("/health")
    assert failed.status_code == 503
    assert failed.json()["engines"]["one"]["ok"]
    told = failed.json()["engines"]["two"]
    assert not told["ok"]
    # Until it is started again, which begins within a second.
    assert told["error"].endswith("the fake engine is stopped")
