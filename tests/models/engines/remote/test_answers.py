"""Good answers, told in the many ways in which servers tell them."""

import asyncio
import gzip
import json
import math
from typing import Any

import pytest

from models.answer_format import ReasoningTags, Tools, join_calls
from models.chat_template import Rendering
from models.engines.base import Chunk
from models.engines.registry import create_engine
from models.engines.remote import engine, events
from models.errors import (
    ContextOverflow,
    EngineError,
    EngineFailed,
    EngineOverloaded,
    RequestError,
    without_quotes,
)
from models.spec import Model, ModelSpec, RemoteModelSpec
from tests.models.engines.remote.asking import (
    HELLO,
    STOP,
    ask,
    read,
    request_of,
    running_engine,
    spec_of,
    text_of,
)
from tests.models.engines.remote.bad_server import CUT, HANG, BadServer, Reply, answer, finish


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ("eos", "stop"),
        ("end_turn", "stop"),
        ("anything", "stop"),
        ("function_call", "stop"),
        ("MAX_TOKENS", "length"),
        ("length", "length"),
        ("SAFETY", "content_filter"),
        ("content-filter", "content_filter"),
    ],
)
def test_ends_are_read_by_any_name(told: str, reason: str) -> None:
    """A word that nobody knows ends an answer as well as "stop" does."""
    chunks = ask(HELLO, *finish(told))
    assert (text_of(chunks), chunks[-1].finish_reason) == ("Hello", reason)


@pytest.mark.parametrize("reason", ["", None, "null", "None"])
def test_an_end_without_a_reason_is_an_end(reason: Any) -> None:
    """Where the stream's end is announced, no reason is needed."""
    nothing = {"choices": [{"delta": {"content": "Hello"}, "finish_reason": reason}]}
    for end in ("[DONE]", {"choices": [], "usage": {"completion_tokens": 1}}):
        chunks = ask(nothing, end)
        assert (text_of(chunks), chunks[-1].finish_reason) == ("Hello", "stop")
    with pytest.raises(EngineFailed, match="broke off"):
        ask(nothing)


@pytest.mark.parametrize(
    "event",
    [
        b": a comment\n\n",
        b"event: ping\ndata: {}\n\n",
        b'data: {"type": "ping"}\n\n',
        b"data: ping\n\n",
        b"data:\n\n",
        b"id: 7\nretry: 1000\n\n",
        {"choices": []},
        {"choices": None, "error": None},
        {"choices": [{"index": 0, "delta": None, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {"content": None, "role": "assistant"}}]},
        {"choices": [{"index": 1, "delta": {"content": "another choice"}}]},
        {"usage": {"prompt_tokens": 3}},
        {"usage": "unknown", "object": "chat.completion.info"},
        [],
        7,
    ],
)
def test_harmless_events_change_nothing(event: Any) -> None:
    """Pings, comments, events without choices and those of unknown types are passed over."""
    chunks = ask(event, HELLO, event, STOP, event, "[DONE]")
    assert (text_of(chunks), chunks[-1].finish_reason) == ("Hello", "stop")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_lines_end_at_cr_and_lf_only(end: bytes) -> None:
    """Other separators of Unicode belong to the text, wherever the network cuts it."""
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    events = json.dumps(
        {"choices": [{"delta": {"content": text}, "finish_reason": "stop"}]}, ensure_ascii=False
    )
    # JSON escapes control characters, but not the separators.
    stream = b"data: " + events.encode() + end + end + b"data: [DONE]" + end + end
    bytewise = Reply(events=[stream[i : i + 1] for i in range(len(stream))])
    assert text_of(ask(reply=bytewise)) == text_of(ask(stream)) == text


def test_data_over_several_lines_and_without_blank_ones() -> None:
    """The standard's data of several lines are one event; a line that is whole needs no blank."""
    pretty = json.dumps(HELLO, indent=1).replace("\n", "\ndata: ")
    told = f"data: {pretty}\n\ndata: {json.dumps(HELLO)}\ndata: {json.dumps(STOP)}\ndata: [DONE]"
    assert text_of(ask(told.encode())) == "HelloHello"


@pytest.mark.parametrize(
    ("label", "status"),
    [("application/json", 200), ("Text/Plain", 201), ("text/event-stream", 200), (None, 200)],
)
@pytest.mark.parametrize("before", ["", "\ufeff", "\n\n"])
def test_a_server_that_does_not_stream(label: str | None, status: int, before: str) -> None:
    """A whole completion in place of events is an answer, with its usage, whatever its label."""
    message = {"role": "assistant", "content": "Hello", "reasoning_content": "hm"}
    body = {
        "choices": [{"index": 0, "message": message, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2},
    }
    headers = {"content-type": label} if label else {}
    told = (before + json.dumps(body)).encode()
    chunks = ask(reply=Reply(status, headers, events=[told[:3], told[3:]]))
    assert (text_of(chunks), chunks[0].reasoning) == ("Hello", "hm")
    assert (chunks[-1].finish_reason, chunks[-1].output_tokens) == ("length", 2)


def test_events_are_events_by_any_label() -> None:
    """A gateway that calls a stream JSON changes nothing."""
    reply = Reply(headers={"content-type": "application/json"}, events=[HELLO, *finish()])
    assert text_of(ask(reply=reply)) == "Hello"


@pytest.mark.parametrize("told", [{"detail": "gone"}, {"message": "gone", "code": 404}, {}])
def test_without_a_choice_there_is_no_answer(told: Any) -> None:
    """Whatever a server says in place of an answer, its end makes none of it."""
    for end in ("[DONE]", {"choices": [], "usage": {"completion_tokens": 1}}):
        with pytest.raises(EngineFailed, match="broke off"):
            ask(told, end)


@pytest.mark.parametrize(
    ("code", "error"),
    [(429, EngineOverloaded), (400, RequestError), (503, EngineFailed), (401, EngineFailed)],
)
def test_an_error_among_the_events_is_what_its_status_means(
    code: int, error: type[Exception]
) -> None:
    """As if the response had that status: the client's faults are its own, no key shows."""
    with pytest.raises(error) as caught:
        ask({"error": {"message": "of the key sk-1", "code": code}})
    assert ("sk-1" in str(caught.value)) == (code != 401)


def _choice(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": "pelican"}, **fields}]}


def _token(**fields: Any) -> dict[str, Any]:
    return _choice(logprobs={"content": [{"token": "a", "logprob": -1, **fields}]})


@pytest.mark.parametrize(
    "told",
    [
        '{"choices": [{"delta": {"content": "pelican"}}',
        b'{"text": "pelican"',
        _choice(delta={"content": "pelican", "tool_calls": [5]}),
        _choice(logprobs={"content": [{"token": "pelican", "logprob": "pelican"}]}),
        _token(logprob=10**400),
        _token(top_logprobs=[{"token": "a", "logprob": -(10**400)}]),
        _token(bytes=[10**400]),
    ],
)
def test_what_cannot_be_read_is_no_answer_and_stays_out_of_logs(told: Any) -> None:
    """Whatever its numbers are; what a log keeps of the error is not what the server said."""
    with pytest.raises(EngineFailed, match="cannot be read") as caught:
        ask(told, *finish(), logprobs=True)
    assert "pelican" in str(caught.value)
    assert "pelican" not in without_quotes(str(caught.value))


def test_bytes_of_a_token_are_a_list() -> None:
    """A number in their place would be as many zeros."""
    assert ask(_token(bytes=10**12), *finish(), logprobs=True)[0].tokens[0].raw == b"a"


def test_half_of_a_pair_is_sent_on_nowhere() -> None:
    """Stop strings and errors are text that can be written, too."""
    assert ask(HELLO, _choice(delta={}, stop_reason="\ud83d"), "[DONE]")[-1].stop == "\ufffd"
    with pytest.raises(RequestError, match="bad \ufffd") as caught:
        ask({"error": {"message": "bad \ud83d", "param": "p\ud83d", "code": 400}})
    assert caught.value.param == "p\ufffd"


def test_an_answer_without_end_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither data over many lines nor a body that unpacks to a huge one is kept for ever."""
    monkeypatch.setattr(events, "_MOST_CHARACTERS", 1000)
    monkeypatch.setattr(engine, "_MAX_WHOLE_BYTES", 1000)
    many = b"data: {\n" + b"data: 1\n" * 1000
    whole = json.dumps(_choice(finish_reason="stop")).encode()
    big = gzip.compress(whole + b" " * 4000)
    packed = Reply(headers={"content-encoding": "gzip"}, events=[big])
    assert text_of(ask(reply=Reply(events=[whole]))) == "pelican"
    for reply in (Reply(events=[many], end=HANG), packed):
        with pytest.raises(EngineFailed, match="cannot be read"):
            ask(reply=reply)


def test_what_a_message_repeats_is_told_once() -> None:
    """Some servers send the whole message beside the last event."""
    whole = {"delta": {}, "message": {"content": "Hello"}, "finish_reason": "stop"}
    assert text_of(ask(HELLO, {"choices": [whole]}, "[DONE]")) == "Hello"


def test_a_truncated_answer_stays_one() -> None:
    """A last event that says "stop" does not take "length" back."""
    assert ask(HELLO, *finish("length")[:1], *finish())[-1].finish_reason == "length"


@pytest.mark.parametrize("content", [["Hel", "lo"], {"type": "text", "text": "Hello"}])
def test_contents_may_be_parts(content: Any) -> None:
    """One part, and parts that are plain texts, are read as those of OpenAI's form are."""
    assert (
        text_of(ask({"choices": [{"index": "0", "delta": {"content": content}}]}, STOP)) == "Hello"
    )


@pytest.mark.parametrize(
    ("told", "expected"), [(-math.inf, -9999.0), (math.nan, None), (None, None), (-0.5, -0.5)]
)
def test_logprobs_are_numbers_that_json_can_tell(told: float | None, expected: float) -> None:
    """Python's servers write Infinity and NaN, which no other client could read."""
    token = {"token": "a", "logprob": told}
    item = {**token, "top_logprobs": [token, {"token": "b", "logprob": -1}]}
    chat = {"delta": {"content": "a"}, "logprobs": {"content": [item]}}
    text = {"tokens": ["a"], "token_logprobs": [told], "top_logprobs": [{"a": told, "b": -1}]}
    for choice in (chat, {"text": "a", "logprobs": text}):
        [found] = ask({"choices": [choice]}, *finish(), logprobs=True)[0].tokens
        assert found.logprob == expected
        kept = {one.raw: one.logprob for one in found.top}
        assert kept == {b"b": -1} | ({} if expected is None else {b"a": expected})


def scored(body: Any, **sampling: int) -> tuple[list[Chunk], dict[str, Any]]:
    """Return the answer of a server that tells `body` of a text to be scored, and what it got."""

    async def run() -> tuple[list[Chunk], dict[str, Any]]:
        reply = Reply(headers={"content-type": "application/json"}, body=body)
        async with BadServer.running(reply) as server, running_engine(server) as engine:
            wanted = request_of(
                messages=None, text="é so", sampling={"prompt_logprobs": 2, **sampling}
            )
            return await read(engine, wanted), server.requests[0]["body"]

    return asyncio.run(run())


def test_a_prompt_is_scored_as_the_server_tells_it() -> None:
    """The prompt's tokens stand before the answer's, in texts or in bytes where a character has
    several, and their number is in the usage."""
    told = {
        "tokens": ["bytes:\\xc3", "bytes:\\xa9", " so", " on"],
        "token_logprobs": [None, -1.5, -2.5, -0.5],
        "top_logprobs": [None, {"bytes:\\xa9": -1.5}, {" so": -2.5, " no": -0.25}, {" on": -0.5}],
        "text_offset": [0, 0, 1, 4],
    }
    choice = {"index": 0, "text": "é so on", "logprobs": told, "finish_reason": "length"}
    usage = {"prompt_tokens": 3, "completion_tokens": 1}
    chunks, sent = scored({"choices": [choice], "usage": usage}, max_tokens=1)
    assert [sent[name] for name in ("prompt", "echo", "logprobs")] == ["é so", True, 2]
    assert [sent[name] for name in ("stream", "max_tokens")] == [False, 1]
    prompt = chunks[0].prompt
    assert b"".join(token.raw for token in prompt).decode() == "é so"
    assert [token.logprob for token in prompt] == [None, -1.5, -2.5]
    assert [other.raw for other in prompt[2].top] == [b" no", b" so"]
    assert text_of(chunks) == " on"
    assert [token.logprob for chunk in chunks for token in chunk.tokens] == [-0.5]
    assert chunks[-1].output_tokens == 1


@pytest.mark.parametrize("logprob", [-0.5, None])
def test_a_server_that_scores_no_prompts_is_named(logprob: float | None) -> None:
    """One that tells of its answer alone, or of nothing, is refused by the field's name."""
    told = {"tokens": [" on"], "token_logprobs": [logprob], "top_logprobs": None}
    choice = {"text": " on", "logprobs": told if logprob else None, "finish_reason": "length"}
    usage = {"prompt_tokens": 3, "completion_tokens": 1}
    with pytest.raises(RequestError, match="tells no log-probabilities of prompts") as caught:
        scored({"choices": [choice], "usage": usage})
    assert caught.value.param == "echo"


def test_thoughts_and_refusals_are_kept_apart() -> None:
    """Reasoning by either name or as a part, and refusals, stand beside the text."""
    for told in (
        {"reasoning": "hm"},
        {"reasoning_content": "hm", "reasoning": "hm"},
        {"reasoning_content": [{"type": "text", "text": "hm"}]},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]},
    ):
        chunks = ask({"choices": [{"delta": told}]}, HELLO, *finish())
        assert (text_of(chunks), "".join(c.reasoning for c in chunks)) == ("Hello", "hm")
    refused = ask({"choices": [{"delta": {"refusal": "no"}}]}, *finish())
    assert (text_of(refused), refused[0].refusal) == ("", "no")


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (
            {
                "prompt_tokens": 500,
                "completion_tokens": 9,
                "prompt_tokens_details": {"cached_tokens": 400},
                "completion_tokens_details": {"reasoning_tokens": 7},
            },
            (500, 9, 400, 7),
        ),
        ({"prompt_tokens": 0, "completion_tokens": 9.0}, (0, 9, None, None)),
        ({"input_tokens": 5, "output_tokens": 9}, (5, 9, None, None)),
        ({"prompt_tokens": 9, "prompt_cache_hit_tokens": 4}, (9, None, 4, None)),
        ({"prompt_tokens": 9, "cached_tokens": 0}, (9, None, 0, None)),
        ({"prompt_tokens": 2**62, "completion_tokens": -3}, (None,) * 4),
        ({"prompt_tokens": "many", "completion_tokens": 1.5}, (None,) * 4),
        ({"prompt_tokens": float("inf"), "completion_tokens": float("nan")}, (None,) * 4),
        ({"prompt_tokens": True, "prompt_tokens_details": 3}, (None,) * 4),
        ({"prompt_tokens": [1], "completion_tokens": None}, (None,) * 4),
    ],
)
def test_usage_is_believed_as_far_as_it_can_be(usage: Any, expected: tuple[int | None]) -> None:
    """Counts that no model can have are left out, and harm nothing."""
    last = ask(HELLO, STOP, {"choices": [], "usage": usage}, "[DONE]")[-1]
    told = (last.prompt_tokens, last.output_tokens, last.cached_tokens, last.reasoning_tokens)
    assert told == expected


@pytest.mark.parametrize(
    "event",
    [
        {"choices": [], "x_groq": {"usage": {"prompt_tokens": 4}}},
        {"choices": [{"index": 0, "delta": {}, "usage": {"prompt_tokens": 4}}]},
    ],
)
def test_usage_is_found_where_servers_put_it(event: Any) -> None:
    """Groq tells it beside the event, Moonshot in the choice."""
    assert ask(HELLO, STOP, event, "[DONE]")[-1].prompt_tokens == 4


def test_a_cut_stream_is_no_answer() -> None:
    """A connection that breaks before the end is an error; after it the answer is whole."""
    with pytest.raises(EngineFailed, match="Error"):
        ask(reply=Reply(events=[HELLO], end=CUT))
    with pytest.raises(EngineFailed, match="cannot be read"):
        ask(b'data: {"choices": [{"delta": {"content": "Hel')
    assert text_of(ask(reply=Reply(events=[HELLO, STOP], end=CUT))) == "Hello"


def test_half_characters_do_no_harm() -> None:
    """A lone half of a surrogate pair, which no UTF-8 can hold, becomes the replacement."""
    half = {"choices": [{"delta": {"content": "a\ud83db"}}]}
    assert text_of(ask(half, *finish())) == "a\ufffdb"


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 10 tokens. However, you requested 33 tokens.",
        "You passed 33 input tokens and requested 20 output tokens. However, the model's context "
        "length is only 10 tokens, resulting in a maximum input length of 9 tokens.",
        "The decoder prompt (length 33) is longer than the maximum model length of 10.",
        "Your request exceeded model token limit: 8192",
        "Prompt exceeds max length",
        "total tokens of image and text exceed max message tokens",
        "Range of input length should be [1, 30720]",
        "tokens in request more than max tokens allowed: requested 10, max 5",
        "The input (33 tokens) is longer than the model's context length (10 tokens).",
        "the request exceeds the available context size, try increasing it",
        "request (33 tokens) exceeds the available context size (10 tokens)",
        "Context size has been exceeded.",
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 10. Given: 33",
        "Input validation error: `inputs` must have less than 10 tokens. Given: 33",
        "the input length exceeds the context length",
        "prompt too long; exceeded max context length by 23 tokens",
        "Input tokens exceed the configured limit of 10 tokens.",
        "The input token count (33) exceeds the maximum number of tokens allowed (10).",
        "prompt is too long: 33 tokens > 10 maximum",
        "Please reduce the length of the messages or completion.",
        "Prompt contains 33 tokens, too large for model with 10 maximum context length",
    ],
)
def test_overflows_are_recognised_in_many_words(message: str) -> None:
    """However a server says it, and even late or as its own fault, the prompt is too long."""
    for status, body in (
        (400, {"error": {"message": message, "type": "invalid_request_error", "code": 400}}),
        (400, {"object": "error", "message": message, "code": 400}),
        (422, {"error": message, "error_type": "validation"}),
        (500, {"error": {"code": 500, "message": message, "type": "server_error"}}),
    ):
        with pytest.raises(ContextOverflow, match="maximum context length"):
            ask(reply=Reply(status, body=body))
    with pytest.raises(ContextOverflow, match="maximum context length"):
        ask({"error": {"message": message}})


@pytest.mark.parametrize(
    ("status", "message", "error"),
    [
        (400, "max_tokens is too large: 5000. This model supports at most 4096.", RequestError),
        (400, "temperature must be at most 2", RequestError),
        (400, "messages: the context of this call is unclear", RequestError),
        (429, "Request too large: maximum context length per minute reached", EngineOverloaded),
        (500, "worker died", EngineFailed),
    ],
)
def test_other_refusals_are_no_overflows(
    status: int, message: str, error: type[EngineError | RequestError]
) -> None:
    """What speaks of other limits keeps its own error."""
    with pytest.raises(error) as caught:
        ask(reply=Reply(status, body={"error": {"message": message}}))
    assert not isinstance(caught.value, ContextOverflow)


def test_thoughts_and_calls_in_the_text_are_read_where_the_pool_names_them() -> None:
    """A server without parsers of its own is read like a model of ours."""
    said = (
        "<think>Two num",
        "bers.</think>",
        "I add. <tool_call>",
        '{"name": "add", "arguments": {}}',
    )

    async def run() -> list[Any]:
        async with BadServer.running(answer(*said, "</tool_call>")) as server:
            spec = ModelSpec(
                name="a",
                engine="e",
                remote=RemoteModelSpec(),
                reasoning=ReasoningTags(open="<think>", close="</think>"),
                tools="hermes",
            )
            engine = create_engine(spec_of(server.url), [Model(spec=spec, card=None)])
            await engine.start()
            function = {"type": "function", "function": {"name": "add"}}
            request = request_of(rendering=Rendering(), tools=Tools(functions=(function,)))
            chunks = [chunk async for chunk in engine.generate(request)]
            await engine.stop()
            return chunks

    chunks = asyncio.run(run())
    assert "".join(chunk.reasoning for chunk in chunks) == "Two numbers."
    assert text_of(chunks).strip() == "I add."
    [call] = join_calls(call for chunk in chunks for call in chunk.tool_calls)
    assert (call.name, chunks[-1].finish_reason) == ("add", "tool_calls")
