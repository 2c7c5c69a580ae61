"""Tool calls, from a client through our server to a server that calls tools, and back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from models.chat_template import ChatTemplate
from tests.models.engines.remote.bad_server import (
    BadServer,
    Reply,
    answer,
    called,
    finish,
    in_thread,
)
from tests.router.conftest import Running, running

TOOL: Any = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
}
CHAT: Any = [{"role": "user", "content": "What is 2 + 3?"}]


CALLING = Reply(
    events=[
        called("add", ""),
        called(None, '{"a": 2, '),
        called(None, '"b": 3}'),
        *finish("tool_calls", prompt_tokens=30, completion_tokens=12),
    ]
)


@pytest.fixture(name="upstream")
def calling_server() -> Iterator[BadServer]:
    """A server that answers everything with one tool call, in three pieces."""
    with in_thread(CALLING) as server:
        yield server


@pytest.fixture(name="front")
def front_server(upstream: BadServer, tmp_path: Path) -> Iterator[Running]:
    """A server with a local model that can call nothing, and one behind the other server."""
    far = {"base_url": upstream.url}
    with running(
        tmp_path,
        engines=[
            {"name": "near", "kind": "fake", "options": {}},
            {"name": "far", "kind": "remote", "options": far},
        ],
        models=[
            {"name": "small", "engine": "near"},
            {"name": "big", "engine": "far", "remote": {}},
        ],
        policies={
            "auto": {
                "kind": "fixed",
                "plan": {"cascade": {"stages": ["small", "big"], "thresholds": [0.1]}},
            }
        },
    ) as server:
        yield server


def test_calls_come_back_whole(front: Running, upstream: BadServer) -> None:
    """The tools reach the model, its call reaches the client, and its tokens are counted."""
    answer = front.chat(model="big", messages=CHAT, tools=[TOOL], tool_choice="required")
    sent = upstream.requests[0]["body"]
    assert (sent["tools"], sent["tool_choice"]) == ([TOOL], "required")
    [choice] = answer.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    [call] = choice.message.tool_calls
    assert (call.id, call.type, call.function.name) == ("call_1", "function", "add")
    assert json.loads(call.function.arguments) == {"a": 2, "b": 3}
    assert answer.usage.completion_tokens == 12
    assert answer.shoal["tokens"]["big"] == {"prompt": 30, "output": 12}


def test_calls_stream(front: Running) -> None:
    """A call streams in pieces, its id and name with the first; then comes the reason."""
    chunks = list(front.chat(model="big", messages=CHAT, tools=[TOOL], stream=True))
    pieces = [c.choices[0].delta.tool_calls for c in chunks if c.choices[0].delta.tool_calls]
    calls = [call for [call] in pieces]
    assert [(c.index, c.id, c.function.name) for c in calls] == [
        (0, "call_1", "add"),
        (0, None, None),
    ]
    assert "".join(c.function.arguments for c in calls) == '{"a": 2, "b": 3}'
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_results_go_back_to_the_model(front: Running, upstream: BadServer) -> None:
    """The assistant's call and the tool's answer are turns like others."""
    called: Any = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
        ],
    }
    result: Any = {"role": "tool", "tool_call_id": "call_1", "content": "5"}
    front.chat(model="big", messages=[*CHAT, called, result], tools=[TOOL])
    sent = upstream.requests[0]["body"]["messages"]
    assert sent == [*CHAT, called, result]


def test_requests_go_on_as_they_came(front: Running, upstream: BadServer) -> None:
    """Names, strictness, null contents and fields that only that server knows arrive unchanged."""
    schema = {"name": "person", "strict": False, "schema": {"type": "object"}}
    part = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    fields: Any = {
        "messages": [
            {"role": "developer", "content": "be brief", "name": "boss"},
            {"role": "user", "content": [part], "name": "bob"},
        ],
        "tools": [{**TOOL, "function": {**TOOL["function"], "strict": True}}],
        "parallel_tool_calls": False,
        "response_format": {"type": "json_schema", "json_schema": schema},
        "repetition_penalty": 1.2,
        "provider": {"order": ["x"]},
        "user": "u",
    }
    front.post(model="big", n=2, max_completion_tokens=9, shoal={"explain": True}, **fields)
    ours = {"model": "big", "stream": True, "stream_options": {"include_usage": True}}
    ours |= {"max_tokens": 9, "logprobs": True}
    assert [sent["body"] for sent in upstream.requests] == [{**fields, **ours}] * 2


def test_pictures_go_to_who_may_see_them(front: Running, upstream: BadServer) -> None:
    """A policy gives a conversation with a picture to a member that gets it as it came."""
    upstream.replies[:] = [answer("A cat.")]
    upstream.requests.clear()
    url = {"url": "data:image/png;base64,aGk=", "detail": "low"}
    content: Any = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": url}]
    messages: Any = [{"role": "user", "content": content}]
    told = front.chat(model="auto", messages=messages)
    assert told.shoal["members"] == ["big"]
    [request] = upstream.requests
    assert request["body"]["messages"] == messages
    with pytest.raises(openai.BadRequestError, match=r"image_url.*small; only text is"):
        front.chat(model="small", messages=messages)


def test_the_server_counts(front: Running) -> None:
    """Usage is the server's, for the client, the price and the record; thoughts count apart."""
    front.forget()
    answer = front.chat(model="big", messages=CHAT, n=2)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (30, 24)
    assert answer.shoal["tokens"]["big"] == {"prompt": 60, "output": 24}
    record = front.last_record()
    assert (record.prompt_tokens, record.output_tokens) == (30, 24)


def test_models_that_call_nothing_refuse_tools(front: Running) -> None:
    """Asked by name they answer 400; a cascade goes on to the stage that can."""
    with pytest.raises(openai.BadRequestError, match="small cannot call any") as caught:
        front.chat(model="small", messages=CHAT, tools=[TOOL])
    assert caught.value.param == "tools"
    assert front.chat("hi", "small", tools=[TOOL], tool_choice="none").choices[0].message.content
    answer = front.chat(model="auto", messages=CHAT, tools=[TOOL])
    assert answer.choices[0].message.tool_calls
    assert answer.shoal["members"] == ["big"]


def test_templates_get_tools_and_arguments_as_objects() -> None:
    """As transformers renders them: tools as they came, the arguments of calls parsed."""
    template = ChatTemplate(
        "{{ tools[0].function.name }}{% for m in messages %}"
        "{% for c in m.tool_calls or [] %} {{ c.function.arguments.a }}{% endfor %}{% endfor %}",
        special_tokens={},
    )
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 7}'}}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    assert template.render(turns, [TOOL]) == "add 7"


def test_mistral_templates_get_ids_that_they_take() -> None:
    """Nine letters and digits, whoever made the call; the result's id is the same one."""
    template = ChatTemplate(
        "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls[0].id }}"
        "{% else %}{{ m.tool_call_id }}{% endif %} {% endfor %}",
        special_tokens={},
    )

    def rendered(identity: str) -> list[str]:
        call = {"id": identity, "function": {"name": "add", "arguments": "{}"}}
        turns: Any = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "5", "tool_call_id": identity},
        ]
        return template.render(turns).removeprefix("[TOOL_CALLS]").split()

    made, answered = rendered("call_of_somebody_else")
    assert made == answered != rendered("call_of_another")[0]
    assert len(made) == 9
    assert made.isalnum()
    assert rendered("VvvODy9mT") == ["VvvODy9mT"] * 2
