"""Errors: the right status, OpenAI's body, and the field that is at fault."""

from typing import Any

import httpx
import openai
import pytest

USER = {"role": "user", "content": "x"}
CALL = {"id": "c", "function": {"name": "add", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "add"}}
OTHER = {"type": "function", "function": {"name": "subtract"}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


def _error(response: httpx.Response) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert response.headers["content-type"] == "application/json"
    return dict(error)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": 3}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [USER, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
        ({"messages": [USER, {"role": "critic", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content"),
        ({"messages": [{**USER, "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
        ({"messages": [{**USER, "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": -1}, "max_completion_tokens"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"seed": 1.5}, "seed"),
        ({"stop": [f"s{i}" for i in range(17)]}, "stop"),
        ({"stop": "s" * 1025}, "stop"),
        ({"model": "m" * 300}, "model"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"messages": [USER] * 2049}, "messages"),
        ({"max_tokens": 2**62}, "max_tokens"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"stop_token_ids": [2**40]}, "stop_token_ids[0]"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"tools": [TOOL] * 129}, "tools"),
        ({"stop": ""}, "stop"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"tool_choice": True}, "tool_choice"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        (
            {"messages": [{"role": "assistant", "content": None, "function_call": {"name": "f"}}]},
            "messages[0].function_call",
        ),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [TOOL]}, "tools"),
        ({"tool_choice": "perhaps"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": OTHER}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"prediction": {"type": "content"}}, "prediction"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"reasoning_effort": "enormous"}, "reasoning_effort"),
        ({"min_p": 2}, "min_p"),
        ({"shoal": {"polcy": "auto"}}, "shoal.polcy"),
        ({"shoal": {"policy": "nobody"}}, "shoal.policy"),
        ({"shoal": {"plan": {"answer": {"members": ["nobody"]}}}}, "shoal.plan"),
        (
            {"shoal": {"plan": {"answer": {"members": ["alpha", "gamma"], "rule": "gated"}}}},
            "shoal.plan",
        ),
        ({"shoal": {"plan": {"anwser": {}}}}, "shoal.plan"),
        ({"shoal": {"plan": "alpha", "policy": "auto"}}, "shoal.plan"),
        ({"shoal": {"timeout_s": 0}}, "shoal.timeout_s"),
        ({"shoal": {"max_usd": 0}}, "shoal.max_usd"),
    ],
)
def test_bad_fields_are_named(server: Any, body: dict[str, Any], param: str) -> None:
    """Each field that cannot be honoured gets 400 with its name."""
    response = server.post(**body)
    assert response.status_code == 400
    error = _error(response)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert server.last_record().status == 400


def test_a_function_that_tools_lack_is_named(server: Any) -> None:
    """So are those that there are, of a plain choice and of a choice among some."""
    choices = (
        OTHER,
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [OTHER]}},
    )
    for choice in choices:
        message = _error(server.post(tools=[TOOL], tool_choice=choice))["message"]
        assert repr(OTHER["function"]["name"]) in message
        assert f"they have {TOOL['function']['name']}" in message


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"\xff"])
def test_malformed_json(server: Any, content: bytes) -> None:
    """A body that is no JSON object is refused, and said so."""
    response = server.http.post("/v1/chat/completions", content=content)
    assert (response.status_code, _error(response)["code"]) == (400, "invalid_json")


def test_unknown_model(server: Any) -> None:
    """A model that isn't there is the client's NotFoundError."""
    for name in ("nobody", "policy/nobody", "auto2"):
        with pytest.raises(openai.NotFoundError) as caught:
            server.chat(model=name)
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_context_overflow(server: Any) -> None:
    """A prompt that leaves no room for the answer has the code clients look for."""
    for fields in ({"text": "x" * 9000}, {"max_tokens": 8190}):
        with pytest.raises(openai.BadRequestError) as caught:
            server.chat(**fields)
        assert caught.value.code == "context_length_exceeded"


def test_unknown_paths_and_methods(server: Any) -> None:
    """What has no route is refused in the same shape."""
    missing = server.http.get("/v2/chat")
    assert (missing.status_code, _error(missing)["code"]) == (404, "not_found")
    wrong = server.http.get("/v1/chat/completions")
    assert (wrong.status_code, _error(wrong)["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


def test_oversized_body(serve: Any) -> None:
    """A body above the limit gets 413, declared or not."""
    server = serve(limits={"max_body_bytes": 100})
    declared = server.post(messages=[{"role": "user", "content": "x" * 100}])
    assert (declared.status_code, _error(declared)["code"]) == (413, "body_too_large")
    parts = (b"x" * 60 for _ in range(2))
    undeclared = server.http.post("/v1/chat/completions", content=parts)
    assert undeclared.status_code == 413


@pytest.mark.parametrize("stream", [False, True])
def test_overload(serve: Any, stream: bool) -> None:
    """A full engine gives 429 and says when to come back, streaming or not."""
    server = serve(engines=_engines(refuse=True))
    response = server.post(stream=stream)
    assert (response.status_code, _error(response)["code"]) == (429, "overloaded")
    assert int(response.headers["retry-after"]) >= 1
    assert int(response.headers["retry-after-ms"]) >= 1
    with pytest.raises(openai.RateLimitError):
        server.chat()


@pytest.mark.parametrize("stream", [False, True])
def test_engine_failure_before_the_first_token(serve: Any, stream: bool) -> None:
    """An engine that fails at once gives 503, streaming or not."""
    server = serve(engines=_engines(fail_after_tokens=0))
    response = server.post(stream=stream)
    assert (response.status_code, _error(response)["code"]) == (503, "engine_failed")
    assert server.last_record().error == "engine_failed"


def test_engine_failure_in_mid_stream(serve: Any) -> None:
    """An error after the first token becomes an event that the client raises."""
    server = serve(engines=_engines(fail_after_tokens=3))
    text = ""
    with pytest.raises(openai.APIError, match="fails after 3 tokens"):
        for chunk in server.chat("hello", stream=True):
            text += chunk.choices[0].delta.content or ""
    assert text == "hel"
    record = server.last_record()
    assert (record.status, record.error, record.output_tokens) == (503, "engine_failed", 3)


@pytest.mark.parametrize("stream", [False, True])
def test_timeout(serve: Any, stream: bool) -> None:
    """A request that outlives its own timeout ends with 504 and frees its lane."""
    server = serve(engines=_engines(time_to_first_token_s=30))
    by_field = server.post(shoal={"timeout_s": 0.05}, stream=stream)
    assert (by_field.status_code, _error(by_field)["code"]) == (504, "deadline_exceeded")
    assert by_field.headers["x-should-retry"] == "false"
    by_header = server.http.post(
        "/v1/chat/completions",
        json={"model": "alpha", "messages": [USER]},
        headers={"x-shoal-timeout-s": "0.05"},
    )
    assert by_header.status_code == 504
    server.wait(lambda: _lanes(server) == 0)


def test_bad_timeout_header(server: Any) -> None:
    """A timeout header that is no positive number is refused by name."""
    for value in ("soon", "-1", "nan"):
        response = server.http.post(
            "/v1/chat/completions",
            json={"model": "alpha", "messages": [USER]},
            headers={"x-shoal-timeout-s": value},
        )
        assert (response.status_code, _error(response)["param"]) == (400, "x-shoal-timeout-s")


def _engines(**options: Any) -> list[dict[str, Any]]:
    return [{"name": "one", "kind": "fake", "options": options}, {"name": "two", "kind": "fake"}]


def _lanes(server: Any) -> int:
    health = server.http.get("/health").json()
    return sum(engine["active_lanes"] for engine in health["engines"].values())
