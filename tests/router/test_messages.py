"""`/v1/messages`, asked by Anthropic's own client, answered by a model on another server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from tests.models.engines.remote.bad_server import BadServer, Reply, answer, finish
from tests.router.conftest import Running, running
from tests.router.upstream import EVENTS, event, front_server, other_server  # noqa: F401 (fixtures)

TOOL: Any = {
    "name": "add",
    "description": "Add.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
CHAT: Any = [{"role": "user", "content": "What is 2 + 3?"}]


@pytest.fixture(name="client")
def anthropic_client(front: Running, upstream: BadServer) -> Iterator[anthropic.Anthropic]:
    """Anthropic's own client; the other server answers with thoughts, text and two calls."""
    upstream.replies[:] = [Reply(events=EVENTS)]
    upstream.requests.clear()
    front.forget()
    with anthropic.Anthropic(base_url=front.url, api_key="none", max_retries=0) as client:
        yield client


def test_a_message_has_its_blocks(client: anthropic.Anthropic, front: Running) -> None:
    """Thoughts, text and calls are blocks; usage tells what a cache had; one record is kept."""
    message = client.messages.create(model="auto", max_tokens=64, messages=CHAT, tools=[TOOL])
    assert (message.type, message.role, message.model) == ("message", "assistant", "auto")
    assert message.id.startswith("msg_")
    assert [block.to_dict() for block in message.content] == [
        {"type": "thinking", "thinking": "Two numbers.", "signature": ""},
        {"type": "text", "text": "I add."},
        {"type": "tool_use", "id": "call_1", "name": "add", "input": {"a": 2}},
        {"type": "tool_use", "id": "call_2", "name": "add", "input": {"a": 4}},
    ]
    assert message.stop_reason == "tool_use"
    usage = message.usage
    assert (usage.input_tokens, usage.cache_read_input_tokens, usage.output_tokens) == (20, 10, 12)
    assert message.to_dict()["shoal"]["members"] == ["big"]  # type: ignore[index]
    record = front.last_record()
    assert (record.endpoint, record.status, record.output_tokens) == ("/v1/messages", 200, 12)


def test_a_stream_tells_the_same_message(client: anthropic.Anthropic) -> None:
    """The client assembles from the events the message that it gets whole; blocks never mix."""
    whole = client.messages.create(model="auto", max_tokens=64, messages=CHAT, tools=[TOOL])
    with client.messages.stream(model="auto", max_tokens=64, messages=CHAT, tools=[TOOL]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert [block.to_dict() for block in final.content] == [b.to_dict() for b in whole.content]
    assert (final.stop_reason, final.usage.output_tokens) == ("tool_use", 12)
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4


def test_what_claude_code_sends_is_answered(front: Running, upstream: BadServer) -> None:
    """Its request, recorded: betas, cached system blocks, metadata, thinking, results of calls."""
    upstream.replies[:] = [answer("Five.", prompt_tokens=9, completion_tokens=2)]
    upstream.replies[0].events[0]["choices"][0]["logprobs"] = None
    upstream.requests.clear()
    cached = {"cache_control": {"type": "ephemeral"}}
    body = {
        "model": "big",
        "max_tokens": 32000,
        "temperature": 1,
        "stream": True,
        "system": [
            {"type": "text", "text": "You are Claude Code.", **cached},
            {"type": "text", "text": "Be brief.", **cached},
        ],
        "metadata": {"user_id": "user_1_account__session_2"},
        "thinking": {"type": "enabled", "budget_tokens": 31999},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "tools": [{**TOOL, **cached, "eager_input_streaming": True}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "What is 2 + 3?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "I add.", "signature": ""},
                    {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 2}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "t1",
                        "content": [{"type": "text", "text": "5"}],
                        **cached,
                    },
                    {"type": "text", "text": "Well?"},
                ],
            },
        ],
    }
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "x", "x-api-key": "k"}
    response = front.http.post("/v1/messages?beta=true", json=body, headers=headers)
    assert response.status_code == 200
    names = [line for line in response.text.splitlines() if line.startswith("event: ")]
    assert names[-1] == "event: message_stop"
    assert "[DONE]" not in response.text
    [request] = upstream.requests
    sent = request["body"]
    assert sent["messages"] == [
        {"role": "system", "content": "You are Claude Code.\n\nBe brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is 2 + 3?"}]},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "I add.",
            "tool_calls": [
                {
                    "id": "t1",
                    "type": "function",
                    "function": {"name": "add", "arguments": '{"a": 2}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "5"},
        {"role": "user", "content": [{"type": "text", "text": "Well?"}]},
    ]
    function = {"name": "add", "description": "Add.", "parameters": TOOL["input_schema"]}
    assert sent["tools"] == [{"type": "function", "function": function}]
    assert (sent["tool_choice"], sent["parallel_tool_calls"]) == ("auto", False)
    assert sent["max_tokens"] == 32000
    assert "thinking" not in sent


def test_a_ceiling_of_tokens_is_no_promise(client: anthropic.Anthropic) -> None:
    """`max_tokens` beyond the model's context shortens the answer and refuses nothing."""
    with client.messages.stream(model="small", max_tokens=10**6, messages=CHAT) as stream:
        assert stream.get_final_text()


def test_a_stop_sequence_is_named(client: anthropic.Anthropic, upstream: BadServer) -> None:
    """By a model of ours, and by one on another server that says which it was."""
    asked: Any = {
        "model": "small",
        "max_tokens": 30,
        "messages": CHAT,
        "stop_sequences": ["+", "!"],
    }
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "+")
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "stop_reason": "!"}]}
    upstream.replies[:] = [Reply(events=[event(content="Five"), end, "[DONE]"])]
    far = client.messages.create(**{**asked, "model": "big"})
    assert (far.stop_reason, far.stop_sequence) == ("stop_sequence", "!")


def test_pictures_reach_who_can_see_them(client: anthropic.Anthropic, upstream: BadServer) -> None:
    """Those of a user, and those of a call's result, which follow all results; others refuse."""
    png = {"type": "base64", "media_type": "image/png", "data": "aGk="}
    picture: Any = {"type": "image", "source": png}
    calls: Any = [{"type": "tool_use", "id": i, "name": "add", "input": {}} for i in "ab"]
    results: Any = [
        {"type": "tool_result", "tool_use_id": "a", "content": [picture]},
        {"type": "tool_result", "tool_use_id": "b", "content": "text"},
        {"type": "text", "text": "And?"},
    ]
    messages: Any = [
        {"role": "user", "content": [{"type": "text", "text": "Look."}, picture]},
        {"role": "assistant", "content": calls},
        {"role": "user", "content": results},
    ]
    client.messages.create(model="big", max_tokens=8, messages=messages, tools=[TOOL])
    [request] = upstream.requests
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
    sent = request["body"]["messages"]
    assert sent[0]["content"] == [{"type": "text", "text": "Look."}, part]
    assert [turn["role"] for turn in sent[2:]] == ["tool", "tool", "user"]
    assert sent[4]["content"] == [part, {"type": "text", "text": "And?"}]
    with pytest.raises(anthropic.BadRequestError, match="image_url"):
        client.messages.create(model="small", max_tokens=8, messages=messages[:1])


def test_tokens_are_counted(client: anthropic.Anthropic, front: Running) -> None:
    """Counting agrees with usage, answers nothing and keeps no record."""
    counted = client.messages.count_tokens(model="small", messages=CHAT, system="Be brief.")
    message = client.messages.create(model="small", max_tokens=8, messages=CHAT, system="Be brief.")
    assert counted.input_tokens == message.usage.input_tokens
    assert front.last_record().endpoint == "/v1/messages"
    with pytest.raises(anthropic.NotFoundError, match="does not exist"):
        client.messages.count_tokens(model="nobody", messages=CHAT)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"messages": []}, "messages"),
        ({"output_config": {"format": "json"}}, "output_config.format: must be an object"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format needs"),
        ({"output_config": {"effort": "some"}}, "output_config.effort: "),
        ({"stop_sequences": [""]}, "stop_sequences: "),
        ({"mcp_servers": [{"type": "url"}]}, "mcp_servers is not supported"),
        ({"inference_geo": "us"}, "inference_geo is not supported"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "web_search_20250305"),
        ({"tool_choice": {"type": "tool", "name": "no"}, "tools": [TOOL]}, "tool_choice"),
        ({"messages": [{"role": "user", "content": [{"type": "document"}]}]}, "'document' is not"),
    ],
)
def test_bad_requests_are_told_in_anthropics_shape(
    client: anthropic.Anthropic, fields: dict[str, Any], message: str
) -> None:
    """A 400 is the client's own exception and names what is wrong, as do other paths' errors."""
    asked: Any = {"model": "small", "max_tokens": 8, "messages": CHAT, "extra_body": fields}
    with pytest.raises(anthropic.BadRequestError, match=message) as caught:
        client.messages.create(**asked)
    assert caught.value.body["type"] == "error"  # type: ignore[index]
    assert caught.value.body["error"]["type"] == "invalid_request_error"  # type: ignore[index]
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.batches.retrieve("batch_1")
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]


def test_overflow_and_failure_are_told_as_anthropic_does(
    client: anthropic.Anthropic, upstream: BadServer, front: Running
) -> None:
    """Clients look for "prompt is too long"; a stream that breaks off ends in an error event."""
    words = "This model's maximum context length is 10 tokens."
    upstream.replies[:] = [Reply(400, body={"error": {"message": words}})]
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(model="big", max_tokens=8, messages=CHAT)
    upstream.replies[:] = [Reply(events=[event(content="Half")])]
    with (
        pytest.raises(anthropic.APIStatusError, match="broke off"),
        client.messages.stream(model="big", max_tokens=8, messages=CHAT) as stream,
    ):
        list(stream)
    upstream.replies[:] = [Reply(events=[event(content="x"), *finish("length")])]
    cut = client.messages.create(model="big", max_tokens=8, messages=CHAT)
    assert cut.stop_reason == "max_tokens"


def test_keys_come_in_anthropics_header(tmp_path: Path) -> None:
    """`x-api-key` is a key as well as a bearer's; errors keep Anthropic's shape."""
    with running(tmp_path, app={"auth": {"required": True}}) as server:
        body = {"model": "alpha", "max_tokens": 4, "messages": CHAT}
        refused = httpx.post(f"{server.url}/v1/messages", json=body, headers={"x-api-key": "no"})
        assert refused.status_code == 401
        assert refused.json()["error"]["type"] == "authentication_error"


def test_an_answer_goes_on_from_what_the_client_began(
    client: anthropic.Anthropic, front: Running, upstream: BadServer
) -> None:
    """An assistant's text as the last message is not a turn of its own; others get it as it is."""
    begun: Any = [*CHAT, {"role": "assistant", "content": "The sum"}]
    told = front.post("/tokenize", model="small", messages=begun, continue_final_message=True)
    expected = told.json()["count"]
    message = client.messages.create(model="small", max_tokens=8, messages=begun)
    assert message.usage.input_tokens == expected
    assert client.messages.count_tokens(model="small", messages=begun).input_tokens == expected
    client.messages.create(model="big", max_tokens=8, messages=begun)
    [request] = upstream.requests
    assert request["body"]["messages"] == begun
    assert "continue_final_message" not in request["body"]
