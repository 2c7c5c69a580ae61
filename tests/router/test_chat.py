"""`/v1/chat/completions` as the openai client sees it."""

import json
from dataclasses import asdict
from typing import Any

import openai
import pytest


def test_answers(server: Any) -> None:
    """A whole answer has OpenAI's fields, the usage, and what Shoal did."""
    answer = server.chat("Grüße!")
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Grüße!")
    assert (choice.finish_reason, choice.message.refusal, choice.logprobs) == ("stop", None, None)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint.startswith("fp_")
    # role and newline, 8 bytes, end of turn, "assistant\n"; 8 bytes and the end of the answer
    assert answer.usage.prompt_tokens == 5 + 8 + 1 + 10
    assert answer.usage.completion_tokens == 9
    assert answer.usage.total_tokens == 33
    assert answer.shoal["members"] == ["alpha"]
    assert answer.shoal["plan"] == {"answer": {"members": ["alpha"], "rule": "mixture"}}
    assert answer.shoal["tokens"] == {"alpha": {"prompt": 24, "output": 9}}
    assert answer.shoal["cost"]["usd"] == pytest.approx(24e-6 + 18e-6)
    assert answer.shoal["policy"] is None


def test_auto_uses_the_pools_policy(server: Any) -> None:
    """The model "auto" is the pool's default policy, and policies have names of their own."""
    assert server.chat(model="auto").shoal["members"] == ["beta"]
    named = server.chat(model="policy/auto")
    assert (named.shoal["policy"], named.shoal["reason"]) == ("auto", "fixed plan")
    assert named.model == "policy/auto"


def test_streams(server: Any) -> None:
    """A stream opens with the role, carries the text, and ends with reason and shoal object."""
    chunks = list(server.chat("hello", stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "hello"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    assert chunks[-1].shoal["tokens"]["alpha"]["output"] == 6
    assert not any("usage" in chunk.model_fields_set for chunk in chunks)


def test_streams_usage_when_asked(server: Any) -> None:
    """include_usage adds one chunk without choices; all others say usage null; [DONE] is last."""
    body = {"stream": True, "stream_options": {"include_usage": True}}
    lines = server.post(**body).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    *others, last = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert last["shoal"]["members"] == ["alpha"]
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in others)


def test_every_chunk_tells_the_usage_where_that_is_asked_for(server: Any) -> None:
    """vLLM's continuous_usage_stats counts what was told so far, and ends with the same sum."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    lines = server.post(stream=True, stream_options=options).text.strip().split("\n\n")
    *others, last = [json.loads(line.removeprefix("data: "))["usage"] for line in lines[:-1]]
    counts = [usage["completion_tokens"] for usage in others]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 6)
    assert {usage["prompt_tokens"] for usage in others} == {last["prompt_tokens"]}
    assert others[-1] == {name: last[name] for name in others[-1]}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"stop": ["l", "x"]}, "l"), ({"stop": "x"}, None), ({"max_tokens": 2}, None)],
)
def test_what_stopped_an_answer_is_told(server: Any, fields: Any, reason: str | None) -> None:
    """As vLLM's `stop_reason`, whole and streamed; nothing where the answer ended by itself."""
    choice = server.chat(extra_body=fields).choices[0]
    [*_, last] = server.chat(stream=True, extra_body=fields)
    assert choice.to_dict().get("stop_reason") == reason
    assert last.choices[0].to_dict().get("stop_reason") == reason


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices(serve: Any, stream: bool) -> None:
    """n choices are separate answers; the prompt counts once, every member's tokens all."""
    options = {"answers": ["one", "three", "two"]}
    server = serve(
        engines=[
            {"name": "one", "kind": "fake", "options": options},
            {"name": "two", "kind": "fake"},
        ]
    )
    if stream:
        texts = ["", "", ""]
        for chunk in server.chat(n=3, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        shoal = chunk.shoal
    else:
        answer = server.chat(n=3)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        texts = [choice.message.content for choice in answer.choices]
        shoal = answer.shoal
        assert answer.usage.prompt_tokens == 21
        assert answer.usage.completion_tokens == 14
    assert sorted(texts) == ["one", "three", "two"]
    assert shoal["tokens"] == {"alpha": {"prompt": 63, "output": 14}}


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(server: Any, stream: bool) -> None:
    """Each token that has text has its log-probability, bytes and alternatives."""
    asked = server.chat("hé", logprobs=True, top_logprobs=2, stream=stream)
    parts = list(asked) if stream else [asked]
    items = [
        item
        for part in parts
        if part.choices[0].logprobs
        for item in part.choices[0].logprobs.content
    ]
    assert [item.bytes for item in items] == [[104], [195], [169]]
    assert [len(item.top_logprobs) for item in items] == [2, 2, 2]
    assert items[0].logprob == -0.1
    assert parts[0].choices[0].logprobs is None or parts[0].choices[0].logprobs.refusal is None


def test_stop_and_max_tokens(server: Any) -> None:
    """stop cuts before the string; both names of max_tokens end with "length"."""
    stopped = server.chat("one. two", stop=". t").choices[0]
    assert (stopped.message.content, stopped.finish_reason) == ("one", "stop")
    for name in ("max_tokens", "max_completion_tokens"):
        cut = server.chat("hello", **{name: 2}).choices[0]
        assert (cut.message.content, cut.finish_reason) == ("he", "length")


def test_content_parts_and_roles(server: Any) -> None:
    """Text parts are joined, developer counts as system, unknown extras are tolerated."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "x", "name": "me"},
        {"role": "user", "content": parts},
    ]
    extras = {
        "store": False,
        "metadata": {"k": "v"},
        "made_up": 1,
        "tools": [],
        "tool_choice": None,
    }
    answer = server.chat(messages=messages, extra_body=extras, user="u")
    assert answer.choices[0].message.content == "a\nb"


def test_explicit_plan_policy_and_explanation(server: Any) -> None:
    """The shoal extension replaces what the model stands for, and explains on request."""
    plan = {"answer": {"members": ["alpha", "beta"], "weights": [3, 1], "rule": "product"}}
    answer = server.chat(extra_body={"shoal": {"plan": plan, "explain": True}})
    assert answer.shoal["weights"] == [0.75, 0.25]
    assert answer.shoal["members"] == ["alpha", "beta"]
    assert set(answer.shoal["tokens"]) == {"alpha", "beta"}
    [stage] = answer.shoal["stages"]
    assert (stage["path"], stage["outcome"], stage["output_tokens"]) == ("", "ok", 6)
    assert answer.shoal["scores"] == {}
    policy = server.chat(extra_body={"shoal": {"policy": "auto"}})
    assert (policy.shoal["policy"], policy.shoal["members"]) == ("auto", ["beta"])


def test_headers(server: Any) -> None:
    """A sane request id is kept, another replaced; processing time is told."""
    kept = server.http.post("/v1/chat/completions", headers={"x-request-id": "abc-1"}, json={})
    assert kept.headers["x-request-id"] == "abc-1"
    assert int(kept.headers["openai-processing-ms"]) >= 1
    made = server.http.post("/v1/chat/completions", headers={"x-request-id": "a b"}, json={})
    assert made.headers["x-request-id"].startswith("req_")


def test_records_each_request_once(server: Any) -> None:
    """An answer leaves one record, with what it used and nothing of what was said."""
    answer = server.chat("secret", user="someone", extra_body={"shoal": {"session": "s1"}})
    record = server.last_record()
    assert record.request_id == answer.id
    assert (record.status, record.stream, record.error) == (200, False, None)
    assert (record.model, record.policy, record.session) == ("alpha", None, "s1")
    assert record.prompt_tokens == answer.usage.prompt_tokens
    assert record.members["alpha"].output_tokens == 7
    assert record.usd == pytest.approx(answer.shoal["cost"]["usd"])
    assert 0 < record.ttft_s <= record.latency_s
    assert record.user_hash is not None
    assert "someone" not in json.dumps(asdict(record))
    assert "secret" not in json.dumps(asdict(record))
    list(server.chat(stream=True))
    assert server.last_record().stream
    with pytest.raises(openai.NotFoundError):
        server.chat(model="nobody")
    refused = server.last_record()
    assert (refused.status, refused.error, refused.plan) == (404, "model_not_found", None)


def test_json_formats_reach_the_engine(server: Any) -> None:
    """response_format text, json_object and json_schema are taken."""
    schema = {"name": "n", "schema": {"type": "object"}, "strict": True}
    for wanted in (
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": schema},
    ):
        assert server.chat(response_format=wanted).choices[0].finish_reason == "stop"
