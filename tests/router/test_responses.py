"""`/v1/responses`, asked by OpenAI's own client, answered by a model on another server."""

from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from tests.models.engines.remote.bad_server import BadServer, Reply, finish
from tests.router.conftest import Running
from tests.router.upstream import EVENTS, event, front_server, other_server  # noqa: F401 (fixtures)

TOOL: Any = {
    "type": "function",
    "name": "add",
    "description": "Add.",
    "strict": False,
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
}


@pytest.fixture(name="client")
def openai_client(front: Running, upstream: BadServer) -> Iterator[openai.OpenAI]:
    """OpenAI's own client; the other server answers with thoughts, text and two calls."""
    upstream.replies[:] = [Reply(events=EVENTS)]
    upstream.requests.clear()
    front.forget()
    yield front.client


def test_a_response_has_its_items(client: openai.OpenAI, front: Running) -> None:
    """Thoughts, text and calls are items; usage tells caches; what was asked is repeated."""
    response = client.responses.create(model="auto", input="What is 2 + 3?", tools=[TOOL])
    assert (response.object, response.status, response.error) == ("response", "completed", None)
    thought, message, *calls = response.output
    assert thought.type == "reasoning"
    assert thought.content is not None
    assert thought.content[0].text == "Two numbers."
    assert message.type == "message"
    assert response.output_text == "I add."
    assert [(c.type, c.call_id, c.name, c.arguments) for c in calls] == [  # type: ignore[union-attr]
        ("function_call", "call_1", "add", '{"a": 2}'),
        ("function_call", "call_2", "add", '{"a": 4}'),
    ]
    assert len({item.id for item in response.output}) == 4
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (30, 12)
    assert response.usage.input_tokens_details.cached_tokens == 10
    assert response.tools[0].name == "add"  # type: ignore[union-attr]
    assert response.to_dict()["store"] is False
    record = front.last_record()
    assert (record.endpoint, record.status, record.output_tokens) == ("/v1/responses", 200, 12)


def test_a_stream_tells_the_same_response(client: openai.OpenAI) -> None:
    """The client assembles from the events what it gets whole; they are numbered one by one."""
    whole = client.responses.create(model="auto", input="What is 2 + 3?", tools=[TOOL])
    with client.responses.stream(model="auto", input="What is 2 + 3?", tools=[TOOL]) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.type for event in events][:2] == ["response.created", "response.in_progress"]
    assert events[-1].type == "response.completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))

    raw = client.responses.create(model="auto", input="x", tools=[TOOL], stream=True)
    [completed] = [event for event in raw if event.type == "response.completed"]
    for response in (final, completed.response):
        assert response.output_text == whole.output_text
        assert list(map(_told, response.output)) == list(map(_told, whole.output))


def _told(item: Any) -> tuple[Any, ...]:
    """Return what an item says, whatever it is called."""
    content = [part.text for part in item.content] if item.type != "function_call" else []
    call = (item.call_id, item.arguments) if item.type == "function_call" else ()
    return (item.type, item.status, *content, *call)


def test_what_codex_sends_is_answered(front: Running, upstream: BadServer) -> None:
    """Its request, recorded: instructions, developer's turns, thoughts, calls, their outputs."""
    upstream.replies[:] = [Reply(events=[event(content="Five."), *finish()])]
    upstream.requests.clear()
    body = {
        "model": "big",
        "instructions": "You are Codex.",
        "input": [
            {
                "type": "message",
                "role": "developer",
                "content": [{"type": "input_text", "text": "Be brief."}],
            },
            {
                "type": "message",
                "role": "user",
                "content": [{"type": "input_text", "text": "2 + 3?"}],
            },
            {"type": "reasoning", "summary": [], "content": None, "encrypted_content": None},
            {
                "type": "reasoning",
                "summary": [],
                "content": [{"type": "reasoning_text", "text": "I add."}],
            },
            {"type": "function_call", "name": "add", "arguments": "{}", "call_id": "c1"},
            {"type": "function_call", "name": "add", "arguments": "{}", "call_id": "c2"},
            {"type": "function_call_output", "call_id": "c1", "output": "5"},
            {
                "type": "function_call_output",
                "call_id": "c2",
                "output": [{"type": "input_text", "text": "6"}],
            },
        ],
        "tools": [TOOL],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "text": {"verbosity": "low"},
        "client_metadata": {"x": "y"},
    }
    response = front.http.post("/v1/responses", json=body)
    assert response.status_code == 200
    names = [line for line in response.text.splitlines() if line.startswith("event: ")]
    assert (names[0], names[-1]) == ("event: response.created", "event: response.completed")
    [request] = upstream.requests
    sent = request["body"]

    def call(key: str) -> dict[str, Any]:
        return {"id": key, "type": "function", "function": {"name": "add", "arguments": "{}"}}

    assert sent["messages"] == [
        {"role": "system", "content": "You are Codex."},
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "2 + 3?"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "I add.",
            "tool_calls": [call("c1"), call("c2")],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
        {"role": "tool", "tool_call_id": "c2", "content": "6"},
    ]
    function = {name: TOOL[name] for name in ("name", "description", "strict", "parameters")}
    assert sent["tools"] == [{"type": "function", "function": function}]
    assert (sent["parallel_tool_calls"], sent["reasoning_effort"]) == (False, "medium")
    assert "store" not in sent


def test_schemas_are_held(client: openai.OpenAI, upstream: BadServer) -> None:
    """`text.format` reaches the model as a response format, and the client parses the answer."""

    class Sum(pydantic.BaseModel):
        total: int

    upstream.replies[:] = [Reply(events=[event(content='{"total": 5}'), *finish()])]
    parsed = client.responses.parse(model="big", input="2 + 3?", text_format=Sum)
    assert parsed.output_parsed == Sum(total=5)
    wanted = upstream.requests[0]["body"]["response_format"]
    assert (wanted["type"], wanted["json_schema"]["name"]) == ("json_schema", "Sum")


def test_what_is_not_whole_says_so(client: openai.OpenAI, upstream: BadServer) -> None:
    """A limit makes a response incomplete; a stream that breaks off ends as failed."""
    upstream.replies[:] = [Reply(events=[event(content="x"), *finish("length")])]
    cut = client.responses.create(model="big", input="hi", max_output_tokens=1)
    assert cut.status == "incomplete"
    assert cut.incomplete_details is not None
    assert cut.incomplete_details.reason == "max_output_tokens"
    kinds = [one.type for one in client.responses.create(model="big", input="hi", stream=True)]
    assert kinds[-1] == "response.incomplete"
    upstream.replies[:] = [Reply(events=[event(content="Half")])]
    *_, last = client.responses.create(model="big", input="hi", stream=True)
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert "broke off" in last.response.error.message
    upstream.replies[:] = [Reply(events=[event(refusal="No."), *finish()])]
    [message] = client.responses.create(model="big", input="hi").output
    assert message.content[0].refusal == "No."  # type: ignore[union-attr, index]


def test_what_vllm_adds_means_what_it_means_in_a_chat(
    client: openai.OpenAI, front: Running, upstream: BadServer
) -> None:
    """Stop strings, seeds, template variables; the cache's key names the session."""
    more: Any = {"stop": ["+"], "seed": 5, "prompt_cache_key": "c-1"}
    stopped = client.responses.create(model="small", input="2 + 3", extra_body=more)
    assert stopped.output_text == "2 "
    assert front.last_record().session == "c-1"
    client.responses.create(model="big", input="2 + 3", extra_body=more)
    [request] = upstream.requests
    assert (request["body"]["stop"], request["body"]["seed"]) == (["+"], 5)


def test_a_ceiling_of_tokens_is_no_promise(client: openai.OpenAI) -> None:
    """`max_output_tokens` beyond the model's context shortens the answer and refuses nothing."""
    assert client.responses.create(model="small", input="hi", max_output_tokens=10**6).output_text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": 7}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": "hi"}, {"role": "lord", "content": "x"}]}, "input"),
        ({"input": "x" * 9000}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        ({"reasoning": {"effort": "some"}}, "reasoning.effort"),
        ({"background": True}, "background"),
        ({"text": {"format": "json"}}, "text.format"),
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL], "tool_choice": {"type": "hosted"}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0]"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"top_k": "many"}, "top_k"),
        ({"priority": 3}, "priority"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    client: openai.OpenAI, fields: dict[str, Any], param: str
) -> None:
    """A 400 names the field, and for an unknown type the type."""
    asked: Any = {"model": "small", "input": "hi", "extra_body": fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**asked)
    assert caught.value.param == param
    told = [one.get("type", "") for one in fields.get("tools", ()) if isinstance(one, dict)]
    assert all(kind in caught.value.message for kind in told if kind != "function")
