"""Bodies are bounded before they are parsed; large ones are parsed, and written, off the loop."""

import asyncio
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from models.fair import CLIENT
from models.tokenizer import ByteTokenizer
from router.anthropic_api.request import CountFields, MessagesFields
from router.bodies import STRING, has_more_values
from router.experiments.endpoints import FeedbackBody
from router.openai_api.batches import BatchFields
from router.openai_api.chat import ChatFields
from router.openai_api.completions import CompletionFields
from router.openai_api.encoding import EmbeddingFields, RerankFields
from router.openai_api.responses_request import ResponsesFields
from router.streams import in_json
from router.token_routes import DetokenizeFields, TokenizeFields

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TURN = {"role": "user", "content": "x"}
ENDPOINTS: dict[str, dict[str, Any]] = {
    CHAT: {"model": "alpha", "messages": [TURN]},
    TEXT: {"model": "alpha", "prompt": "x"},
    "/v1/responses": {"model": "alpha", "input": "x"},
    "/v1/messages": {"model": "alpha", "messages": [TURN], "max_tokens": 5},
    "/v1/messages/count_tokens": {"model": "alpha", "messages": [TURN]},
    "/tokenize": {"model": "alpha", "messages": [TURN]},
    "/detokenize": {"model": "alpha", "tokens": [65]},
    "/v1/embeddings": {"model": "alpha", "input": "x"},
    "/v1/rerank": {"model": "alpha", "query": "x", "documents": ["x"]},
    "/v2/rerank": {"model": "alpha", "query": "x", "documents": ["x"]},
    "/rerank": {"model": "alpha", "query": "x", "documents": ["x"]},
    "/v1/batches": {"input_file_id": "f", "endpoint": CHAT, "completion_window": "24h"},
    "/v1/feedback": {"id": "none", "thumb": "up"},
}
SCHEMAS: tuple[type[BaseModel], ...] = (
    ChatFields,
    CompletionFields,
    ResponsesFields,
    MessagesFields,
    CountFields,
    TokenizeFields,
    DetokenizeFields,
    FeedbackBody,
    EmbeddingFields,
    RerankFields,
    BatchFields,
)


def test_threads_work_in_the_name_of_who_sent_it(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long conversation is tokenized on the threads that take clients in turn, in its turn."""
    seen: list[tuple[str, str]] = []
    encode = ByteTokenizer.encode_chat

    def noted(self: ByteTokenizer, *given: Any) -> tuple[int, ...]:
        seen.append((CLIENT.get(), threading.current_thread().name.partition("_")[0]))
        return encode(self, *given)

    monkeypatch.setattr(ByteTokenizer, "encode_chat", noted)
    messages = [{"role": "user", "content": "x"}] * 500
    assert server.post(model="alpha", messages=messages, max_tokens=1).status_code == 200
    assert set(seen) == {("127.0.0.1", "shoal")}


def test_every_endpoint_is_here(server: Any) -> None:
    """What takes JSON is tried below, or takes little of it."""
    paths = server.http.get("/openapi.json").json()["paths"]
    taking = {
        path
        for path, methods in paths.items()
        if "application/json" in methods.get("post", {}).get("requestBody", {}).get("content", {})
    }
    assert taking >= set(ENDPOINTS)
    for path in taking - {*ENDPOINTS, "/v1/admin/reload"}:  # which reads none
        assert server.http.post(path, content=b'"' + b"x" * 2**20 + b'"').status_code == 413, path


@pytest.mark.parametrize("path", ENDPOINTS)
def test_too_many_values_are_refused_unparsed(server: Any, path: str) -> None:
    """What a body holds is counted first: this one is no JSON, and nobody gets to see that."""
    for values in (b"{}," * 150_000, b'"",' * 80_000, b"1," * 260_000):
        body = b'{"model":"alpha","messages":[' + values + b"no JSON"
        answer = server.http.post(path, content=body)
        assert answer.status_code == 400
        message = answer.json()["error"]["message"]
        assert "250000 JSON values (limits.max_body_values)" in message


def test_the_bounds_are_the_operators(serve: Any) -> None:
    """Both stand under `limits`, and an error names them."""
    server = serve(limits={"max_body_values": 60, "max_body_bytes": 1000})
    assert server.post().status_code == 200
    many = server.post(stop_token_ids=list(range(60)))
    assert many.json()["error"]["code"] == "body_too_complex"
    long = server.post(user="u" * 1000)
    assert (long.status_code, long.json()["error"]["code"]) == (413, "body_too_large")
    assert "limits.max_body_bytes" in long.json()["error"]["message"]


def test_what_agents_send_is_let_in(serve: Any) -> None:
    """2,000 turns with calls, 128 tools, 1 MB of text full of commas, 100,000 token ids."""
    engines = [
        {"name": "one", "kind": "fake", "options": {"context_tokens": 2**21, "answers": ["y"]}}
    ]
    server = serve(engines=engines, models=[{"name": "alpha", "engine": "one"}], policies={})
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": [1, 2]}'}}
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "x, y"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": '{"rows": [1, 2, 3]}'},
        {"role": "assistant", "content": "done"},
    ]
    properties = {f"p{i}": {"type": "string", "description": "d", "enum": ["a"]} for i in range(20)}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    long = {"role": "user", "content": '1,2,{"a": [3]}\n' * 70_000}
    for asked in (
        {"messages": [*turns * 500, TURN], "tools": [tool] * 128, "tool_choice": "none"},
        {"messages": [long]},
    ):
        assert server.post(max_tokens=1, **asked).status_code == 200
    assert server.post(TEXT, prompt=[65] * 100_000, max_tokens=1).status_code == 200


TEXT_VALUES = st.text(st.characters(exclude_categories=["Cs"]))
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT_VALUES,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT_VALUES, inner),
)


@given(JSON_VALUES, st.booleans(), st.sampled_from((0, 2**14 - 4, 2**15)), st.integers(0, 3))
def test_values_are_counted_exactly(value: Any, ascii_only: bool, length: int, more: int) -> None:
    """Lists, objects, commas and strings, whatever stands within these, and wherever."""
    value = ['\\"' * (length // 4) + "x" * more, '"\\' * (length // 4), value]

    def count(part: Any) -> int:
        if isinstance(part, dict):
            commas, keys = max(0, len(part) - 1), STRING * len(part)
            return 1 + commas + keys + sum(map(count, part.values()))
        if isinstance(part, list):
            return 1 + max(0, len(part) - 1) + sum(map(count, part))
        return STRING * isinstance(part, str)

    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    assert not has_more_values(body, count(value))
    assert count(value) == 0 or has_more_values(body, count(value) - 1)


@given(JSON_VALUES, st.sampled_from((1, 10**6)))
def test_answers_are_written_as_json(value: Any, num_entries: int) -> None:
    """Whole or piece by piece, what is written is what was meant."""
    content = {"value": value, "many": list(range(3000))}
    written = asyncio.run(in_json(lambda: content, num_entries))
    assert json.loads(written) == content


def _nodes(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
    for part in schema.values() if isinstance(schema, dict) else schema:
        if isinstance(part, dict | list | tuple):
            yield from _nodes(part)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_checking_ends_with_the_first_thing_wrong(schema: type[BaseModel]) -> None:
    """No list is checked to its end for nothing, nor is any longer than some bound.

    Pydantic gathers every error before it tells the first: a million wrong items take a second.
    """
    for node in _nodes(schema.__pydantic_core_schema__):
        if node.get("type") == "list" and node.get("items_schema", {}).get("type") != "any":
            assert node.get("fail_fast") or node["items_schema"]["type"] == "dict", node
            bounded = node.get("max_length") or node["items_schema"]["type"] == "dict"
            assert bounded, node


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"shoal": {f"k{i}": 0 for i in range(30_000)}}),
        (CHAT, {"metadata": {f"k{i}": 0 for i in range(30_000)}}),
        (CHAT, {"stop": ["x"] * 30_000}),
        (CHAT, {"logit_bias": {str(i): 1 for i in range(30_000)}}),
        (CHAT, {"tools": [1] * 100_000}),
        (CHAT, {"chat_template_kwargs": {f"k{i}": 0 for i in range(30_000)}}),
        (CHAT, {"guided_choice": [1] * 100_000}),
        (CHAT, {"shoal": {"plan": {"answer": {f"k{i}": 0 for i in range(30_000)}}}}),
        ("/v1/responses", {"metadata": {f"k{i}": 0 for i in range(30_000)}}),
        ("/v1/responses", {"include": [1] * 100_000}),
        ("/v1/batches", {"metadata": {f"k{i}": "0" for i in range(20_000)}}),
        ("/v1/rerank", {"documents": [1] * 100_000}),
        ("/v1/messages", {"stop_sequences": [1] * 100_000}),
        ("/v1/messages", {"tools": [1] * 100_000}),
    ],
)
def test_long_fields_are_refused_by_their_length(server: Any, path: str, fields: Any) -> None:
    """Objects and lists that are too long for their field name the field, and none of its parts."""
    answer = server.http.post(path, json={**ENDPOINTS[path], **fields})
    assert answer.status_code == 400
    [field] = fields
    assert field in answer.json()["error"]["message"]
    assert f"{field}.k0:" not in answer.json()["error"]["message"]


@contextmanager
def _calls_on_the_loop(server: Any) -> Iterator[list[int]]:
    """Count the functions that the server's event loop calls meanwhile."""
    count = [0]

    def note(frame: Any, kind: str, argument: Any) -> None:
        count[0] += kind in ("call", "c_call")

    async def watch(profile: Any) -> None:
        sys.setprofile(profile)

    asyncio.run_coroutine_threadsafe(watch(note), server.loop).result()
    try:
        yield count
    finally:
        asyncio.run_coroutine_threadsafe(watch(None), server.loop).result()


@pytest.mark.parametrize("path", ENDPOINTS)
def test_no_endpoint_parses_large_bodies_on_the_event_loop(server: Any, path: str) -> None:
    """A body of many values takes as many calls there as one of a single text of its length."""
    turns = [{"role": "user", "content": "x" * 40}, {"role": "assistant", "content": "y"}] * 3000
    numbers = {f"k{number}": number for number in range(30_000)}
    many: dict[str, Any] = {
        CHAT: {"messages": turns},
        TEXT: {"prompt": [65] * 100_000},
        "/v1/responses": {"input": turns},
        "/v1/messages": {"messages": turns},
        "/v1/messages/count_tokens": {"messages": turns},
        "/tokenize": {"messages": turns},
        "/detokenize": {"tokens": [65] * 100_000},
        "/v1/feedback": {"label": [0] * 100_000},
        "/v1/embeddings": {"input": [65] * 100_000},
        "/v1/batches": {"metadata": numbers},
    }.get(path, {"documents": [{"text": "x"}] * 10_000})
    usual = ENDPOINTS[path]
    body = json.dumps({**usual, **many}).encode()
    text = json.dumps({**usual, next(iter(many)): 0, "other": ""}).encode()
    plain = text.replace(b'"other": ""', b'"other": "' + b"x" * (len(body) - len(text)) + b'"')
    counts = []
    for content in (plain, body):
        with _calls_on_the_loop(server) as count:
            server.http.post(path, content=content)
            server.settle()
        counts.append(count[0])
    assert counts[1] < 2 * counts[0] + 2000, counts
