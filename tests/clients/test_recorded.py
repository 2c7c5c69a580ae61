"""What editors and agents send, as they send it: `requests/` has a file of requests for each.

They are written by hand after the clients' sources and what their requests look like on the wire;
`auto` stands for the model, and `caller` where tools are offered, since it can call them.
"""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.clients.conftest import Served

REQUESTS = Path(__file__).parent / "requests"
RECORDED = [
    pytest.param(request, id=f"{file.stem}-{index}")
    for file in sorted(REQUESTS.glob("*.json"))
    for index, request in enumerate(json.loads(file.read_text()))
]


@pytest.mark.parametrize("recorded", RECORDED)
def test_recorded_requests_are_answered(caller: Served, recorded: dict[str, Any]) -> None:
    """Each gets its answer whole, in its own dialect, with tokens counted and tools passed on."""
    body = recorded.get("body")
    response = httpx.request(
        "GET" if body is None else "POST",
        caller.url + recorded["path"],
        json=body,
        headers={**recorded["headers"], "authorization": f"Bearer {caller.key}"},
        timeout=120,
    )
    assert response.status_code == 200, response.text
    if body is None:
        assert "auto" in [model["id"] for model in response.json()["data"]]
        return
    path = recorded["path"].partition("?")[0]
    told = _told(path, response, stream=body.get("stream", False))
    assert told["tokens"] > 0
    if body.get("tools") and not path.endswith("count_tokens"):
        assert told["calls"] == [("add", {"a": 37, "b": 58})]
        [request] = caller.upstream.requests
        names = [tool["function"]["name"] for tool in request["body"]["tools"]]
        assert names == [tool.get("function", tool)["name"] for tool in body["tools"]]


def _told(path: str, response: httpx.Response, *, stream: bool) -> dict[str, Any]:
    """Return the tokens and calls of an answer, having checked that it came to its end."""
    events = _events(response) if stream else [response.json()]
    return {
        "/v1/chat/completions": _chat,
        "/v1/completions": _chat,
        "/v1/responses": _response,
        "/v1/messages": _message,
        "/v1/messages/count_tokens": lambda found: {"tokens": found[0]["input_tokens"]},
    }[path](events)


def _events(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line[:1] == "d"]
    return [json.loads(line) if line != "[DONE]" else line for line in lines]


def _chat(events: list[Any]) -> dict[str, Any]:
    if len(events) > 1:
        assert events.pop() == "[DONE]"
    choices = [choice for event in events for choice in event["choices"]]
    assert choices[-1]["finish_reason"] in ("stop", "length", "tool_calls")
    usage = events[-1].get("usage") or {"completion_tokens": len(choices)}
    pieces = [
        call["function"]
        for choice in choices
        for call in choice.get("delta", choice.get("message", {})).get("tool_calls") or ()
    ]
    arguments = "".join(piece["arguments"] for piece in pieces)
    calls = [(pieces[0]["name"], json.loads(arguments))] if pieces else []
    return {"tokens": usage["completion_tokens"], "calls": calls}


def _response(events: list[Any]) -> dict[str, Any]:
    assert events[0]["type"] == "response.created"
    assert events[-1]["type"] == "response.completed"
    response = events[-1]["response"]
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert done == response["output"]
    calls = [
        (item["name"], json.loads(item["arguments"]))
        for item in done
        if item["type"] == "function_call"
    ]
    return {"tokens": response["usage"]["output_tokens"], "calls": calls}


def _message(events: list[Any]) -> dict[str, Any]:
    if len(events) == 1:
        return {"tokens": events[0]["usage"]["output_tokens"], "calls": []}
    assert [events[0]["type"], events[-1]["type"]] == ["message_start", "message_stop"]
    blocks = [e["content_block"] for e in events if e["type"] == "content_block_start"]
    written = "".join(
        e["delta"]["partial_json"]
        for e in events
        if e["type"] == "content_block_delta" and e["delta"]["type"] == "input_json_delta"
    )
    calls = [(b["name"], json.loads(written)) for b in blocks if b["type"] == "tool_use"]
    return {"tokens": events[-2]["usage"]["output_tokens"], "calls": calls}
