"""A server of ours before another one, which answers with thoughts, text and two calls at once."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.models.engines.remote.bad_server import BadServer, Reply, called, in_thread
from tests.router.conftest import Running, running


def event(**delta: Any) -> dict[str, Any]:
    """Return an event of the other server."""
    return {"choices": [{"index": 0, "delta": delta}]}


# It thinks, speaks, and calls twice at once.
EVENTS: list[Any] = [
    event(reasoning_content="Two "),
    event(reasoning_content="numbers."),
    event(content="I "),
    event(content="add."),
    called("add", '{"a"'),
    called("add", '{"a": 4', 1),
    called(None, ": 2}"),
    called(None, "}", 1),
    {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
    {
        "choices": [],
        "usage": {
            "prompt_tokens": 30,
            "completion_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 10},
        },
    },
    "[DONE]",
]


@pytest.fixture(scope="module", name="upstream")
def other_server() -> Iterator[BadServer]:
    """A server whose replies each test sets."""
    with in_thread(Reply(events=EVENTS)) as server:
        yield server


@pytest.fixture(scope="module", name="front")
def front_server(
    upstream: BadServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A server with a scripted model, and one behind the other server."""
    options = {"base_url": upstream.url, "logprobs": False, "max_retries": 0}
    with running(
        tmp_path_factory.mktemp("pool"),
        engines=[
            {"name": "near", "kind": "fake", "options": {}},
            {"name": "far", "kind": "remote", "options": options},
        ],
        models=[
            {"name": "small", "engine": "near"},
            {"name": "big", "engine": "far", "remote": {}},
        ],
        policies={"auto": {"kind": "fixed", "plan": "big"}},
    ) as server:
        yield server
