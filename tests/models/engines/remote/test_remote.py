"""The remote engine against a server that misbehaves."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.engines.base import EngineStats, Structure
from models.engines.registry import engine_traits
from models.engines.remote.breaker import Circuits
from models.errors import (
    ContextOverflow,
    EngineFailed,
    EngineOverloaded,
    PoolError,
    RequestError,
)
from tests.clock import until
from tests.models.engines.remote.asking import (
    KEY,
    read,
    remote_models,
    request_of,
    running_engine,
    spec_of,
    text_of,
)
from tests.models.engines.remote.bad_server import (
    CUT,
    HANG,
    BadServer,
    Reply,
    answer,
    delta,
    finish,
)


async def test_asks_as_openai_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key, the server's own model name and every option that was asked for are sent."""
    monkeypatch.setenv("UPSTREAM_KEY", KEY)

    async with (
        BadServer.running(answer("hi")) as server,
        running_engine(server, api_key_env="UPSTREAM_KEY", headers={"x-team": "t"}) as engine,
    ):
        sampling = {
            "max_tokens": 7,
            "temperature": 0.5,
            "top_k": 4,
            "seed": 3,
            "stop": ("x",),
            "logit_bias": {5: -1.0},
            "top_logprobs": 2,
            "structure": Structure(kind="json", text='{"type": "string"}'),
        }
        await read(engine, request_of(sampling=sampling))
        [sent] = server.requests
    assert sent["path"] == "/v1/chat/completions"
    assert sent["headers"]["authorization"] == f"Bearer {KEY}"
    assert (sent["headers"]["x-team"], sent["headers"]["x-request-id"]) == ("t", "r-1")
    body = sent["body"]
    schema = body.pop("response_format")["json_schema"]["schema"]
    assert schema == {"type": "string"}
    assert body == {
        "model": "up-a",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 7,
        "temperature": 0.5,
        "top_k": 4,
        "seed": 3,
        "stop": ["x"],
        "logit_bias": {"5": -1.0},
        "logprobs": True,
        "top_logprobs": 2,
    }


@pytest.mark.parametrize(("text", "prompt"), [("once", "once"), (None, [0, 0])])
async def test_texts_and_token_ids_go_to_the_completions_endpoint(text: Any, prompt: Any) -> None:
    """A plain text is sent as it is, token ids as ids; the answer's format is read."""
    events = [
        {
            "choices": [
                {
                    "text": " upon",
                    "logprobs": {
                        "tokens": [" upon"],
                        "token_logprobs": [-0.25],
                        "top_logprobs": [{" upon": -0.25, " more": -2}],
                    },
                    "finish_reason": "length",
                }
            ]
        },
        "[DONE]",
    ]

    async with (
        BadServer.running(Reply(events=events)) as server,
        running_engine(server, max_tokens_field="max_completion_tokens") as engine,
    ):
        chunks = await read(engine, request_of(messages=None, text=text))
        [sent] = server.requests
    assert (sent["path"], sent["body"]["prompt"]) == ("/v1/completions", prompt)
    assert sent["body"]["max_tokens"] == 256
    assert (text_of(chunks), chunks[-1].finish_reason) == (" upon", "length")
    [token] = chunks[0].tokens
    assert (token.logprob, [other.raw for other in token.top]) == (-0.25, [b" upon", b" more"])


async def test_usage_of_the_server_counts() -> None:
    """Tokens that were never shown (reasoning, the end) are counted, and the prompt's too."""
    reply = answer("one", " two", prompt_tokens=41, completion_tokens=9)
    async with BadServer.running(reply) as server, running_engine(server) as engine:
        chunks = await read(engine, request_of())
    assert [token.logprob for chunk in chunks for token in chunk.tokens] == [-0.5, -0.5]
    assert [chunk.prompt_tokens for chunk in chunks] == [None, None, 41]
    assert [chunk.output_tokens for chunk in chunks] == [None, None, 9]


async def test_without_usage_tokens_are_counted() -> None:
    """A server that tells neither usage nor log-probabilities: one token per piece of text."""
    events = [
        delta("", None, reasoning_content="hm"),
        delta("a", None),
        delta("b", None),
        *finish(),
    ]
    async with (
        BadServer.running(Reply(events=events)) as server,
        running_engine(server, logprobs=False) as engine,
    ):
        chunks = await read(engine, request_of())
        assert "logprobs" not in server.requests[0]["body"]
        with pytest.raises(RequestError, match="returns none"):
            await read(engine, request_of(sampling={"top_logprobs": 0}))
    assert (text_of(chunks), chunks[-1].prompt_tokens) == ("ab", None)
    assert sum(len(chunk.tokens) for chunk in chunks) == 3


async def test_missing_logprobs_say_what_to_configure() -> None:
    """A server that ignores `logprobs` makes the answer fail with the option's name."""
    reply = Reply(events=[delta("a", None), *finish()])
    async with BadServer.running(reply) as server, running_engine(server) as engine:
        with pytest.raises(EngineFailed, match="set logprobs: false"):
            await read(engine, request_of())
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reply", "error", "message", "num_requests"),
    [
        (Reply(500), EngineFailed, "answered 500", 3),
        (Reply(503, {"x-should-retry": "false"}), EngineFailed, "answered 503", 1),
        (Reply(404, body={"error": {"message": "no such model"}}), EngineFailed, "no such", 1),
        (Reply(401, body={"error": {"message": KEY}}), EngineFailed, "refuses the key", 1),
        (
            Reply(400, body={"error": {"message": "too hot", "param": "temperature"}}),
            RequestError,
            "too hot",
            1,
        ),
        (
            Reply(400, body={"error": {"message": "long", "code": "context_length_exceeded"}}),
            ContextOverflow,
            "long",
            1,
        ),
        (Reply(events=[delta("a")]), EngineFailed, "broke off", 1),
        (Reply(events=[delta("a")], end=CUT), EngineFailed, "Error", 1),
        (Reply(events=["{"]), EngineFailed, "cannot be read", 3),
        (Reply(events=[{"choices": [5]}]), EngineFailed, "cannot be read", 3),
        (Reply(events=[[]]), EngineFailed, "broke off", 3),
        (Reply(events=[{"error": {"message": "boom"}}]), EngineFailed, "boom", 3),
        (Reply(events=finish("abort")), EngineFailed, "broke off: finish reason 'abort'", 3),
    ],
)
async def test_failures_become_our_errors(
    reply: Reply, error: type[Exception], message: str, num_requests: int
) -> None:
    """Each failure has its error; only what may help is repeated, and never once text has come."""
    async with BadServer.running(reply) as server, running_engine(server) as engine:
        with pytest.raises(error, match=message) as caught:
            await read(engine, request_of())
        assert KEY not in str(caught.value)
        assert len(server.requests) == num_requests
        assert engine.stats().running_requests == 0


async def test_a_silent_server_is_asked_again() -> None:
    """A server that says nothing for `read_timeout_s` has failed, each time that it is asked."""
    async with (
        BadServer.running(Reply(end=HANG)) as server,
        running_engine(server, read_timeout_s=0.2) as engine,
    ):
        with pytest.raises(EngineFailed, match="ReadTimeout"):
            await read(engine, request_of())
        assert len(server.requests) == 3


async def test_a_server_that_falls_silent_is_not_asked_again() -> None:
    """Once text has come nothing is repeated."""
    reply = Reply(events=[delta("a")], end=HANG)
    async with (
        BadServer.running(reply) as server,
        running_engine(server, read_timeout_s=60) as engine,
    ):
        stream = engine.generate(request_of())
        assert (await anext(stream)).text == "a"
        loop = asyncio.get_running_loop()
        began_s, true_time = loop.time(), loop.time
        # From now on a minute passes in 60 ms.
        loop.time = lambda: began_s + 1000 * (true_time() - began_s)  # type: ignore[method-assign]
        reading = asyncio.ensure_future(anext(stream))
        while not reading.done():  # noqa: ASYNC110 - a loop that slept would sleep a minute
            await asyncio.sleep(0)
        with pytest.raises(EngineFailed, match="ReadTimeout"):
            reading.result()
        assert len(server.requests) == 1
        assert engine.stats().running_requests == 0


async def test_a_refusal_names_the_field() -> None:
    """A 400 of the server carries its `param` on to our client."""
    reply = Reply(400, body={"error": {"message": "m", "param": "temperature"}})
    async with BadServer.running(reply) as server, running_engine(server) as engine:
        with pytest.raises(RequestError) as caught:
            await read(engine, request_of())
        assert caught.value.param == "temperature"


@pytest.mark.parametrize("header", [{"retry-after-ms": "150"}, {"retry-after": "0.15"}])
async def test_retry_after_is_obeyed(header: dict[str, str]) -> None:
    """The engine waits as long as the server says, then gets its answer."""
    async with (
        BadServer.running(Reply(429, header), answer("late")) as server,
        running_engine(server) as engine,
    ):
        began_s = time.monotonic()
        assert text_of(await read(engine, request_of(timeout_s=60))) == "late"
        assert time.monotonic() - began_s >= 0.15
        assert engine.stats().circuit == "closed"


@pytest.mark.parametrize("told", ["1e306", "1" * 300])
async def test_nobody_waits_longer_than_a_day(told: str) -> None:
    """What a server asks for is sent on to clients, as a number that all can read."""
    async with (
        BadServer.running(Reply(429, {"retry-after": told})) as server,
        running_engine(server) as engine,
    ):
        with pytest.raises(EngineOverloaded) as caught:
            await read(engine, request_of(timeout_s=600))
        assert caught.value.retry_after_s == 86_400


async def test_cookies_are_not_kept() -> None:
    """What a server sets with one client's answer comes with nobody's question."""
    setting = answer("a")
    setting.headers["set-cookie"] = "session=1; Path=/"
    async with BadServer.running(setting) as server, running_engine(server) as engine:
        for _ in range(2):
            await read(engine, request_of())
        assert "cookie" not in server.requests[1]["headers"]


async def test_no_waiting_past_the_deadline() -> None:
    """When the server wants a pause that outlasts the request, its client hears so at once."""
    async with (
        BadServer.running(Reply(429, {"retry-after": "3600"})) as server,
        running_engine(server) as engine,
    ):
        async with asyncio.timeout(60):
            with pytest.raises(EngineOverloaded) as caught:
                await read(engine, request_of(timeout_s=600))
        assert caught.value.retry_after_s == 3600
        assert len(server.requests) == 1


async def test_the_circuit_opens_and_closes_again() -> None:
    """After failures in a row the server is not asked; later one request finds it well."""
    async with (
        BadServer.running(Reply(500), Reply(500), answer("well")) as server,
        running_engine(server, max_retries=0, breaker_failures=2, breaker_open_s=30) as engine,
    ):
        passed_s = 0.0
        engine._circuits = Circuits(failures=2, open_s=30, clock=lambda: passed_s)
        for _ in range(2):
            with pytest.raises(EngineFailed, match="500"):
                await read(engine, request_of())
        assert engine.stats().circuit == "open"
        with pytest.raises(EngineFailed, match="left alone"):
            await read(engine, request_of())
        assert len(server.requests) == 2
        passed_s = 30.0
        assert engine.stats().circuit == "half-open"
        engine.check_health()
        assert text_of(await read(engine, request_of())) == "well"
        assert engine.stats().circuit == "closed"


async def test_nobody_listening_opens_the_circuit() -> None:
    """A server that cannot be reached counts as failing; the engine starts all the same."""
    async with BadServer.running(answer("x")) as server:
        pass
    async with running_engine(server, breaker_failures=3) as engine:
        with pytest.raises(EngineFailed, match="ConnectError"):
            await read(engine, request_of())
        assert engine.stats().circuit == "open"


async def test_leaving_closes_the_upstream_stream() -> None:
    """Closing the iterator, and cancelling its reader, breaks the connection to the server."""
    hanging = Reply(events=[delta("a")], end=HANG)
    async with (
        BadServer.running(hanging) as server,
        running_engine(server) as engine,
    ):
        stream = engine.generate(request_of())
        assert (await anext(stream)).text == "a"
        await stream.aclose()  # type: ignore[attr-defined]
        reading = asyncio.create_task(read(engine, request_of()))
        await until(lambda: engine.stats().generated_tokens_total == 2)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await until(lambda: server.num_broken == 2)
        assert engine.stats() == replace(EngineStats(circuit="closed"), generated_tokens_total=2)


async def test_stopping_fails_what_runs() -> None:
    """After stop a running request fails at once, and so does the health check."""
    hanging = Reply(events=[delta("a")], end=HANG)
    async with (
        BadServer.running(hanging) as server,
        running_engine(server) as engine,
    ):
        reading = asyncio.create_task(read(engine, request_of()))
        await until(lambda: engine.stats().generated_tokens_total == 1)
        await engine.stop()
        with pytest.raises(EngineFailed, match="was stopped"):
            await asyncio.wait_for(reading, 60)
        with pytest.raises(EngineFailed, match="not running"):
            engine.check_health()


async def test_connections_and_queue_are_bounded() -> None:
    """One runs, one waits for its connection, the third is refused."""
    replies = Reply(events=[delta("a")], end=HANG), answer("b")
    async with (
        BadServer.running(*replies) as server,
        running_engine(server, max_connections=1, max_queued_requests=1) as engine,
    ):
        stream = engine.generate(request_of())
        await anext(stream)
        waiting = asyncio.create_task(read(engine, request_of()))
        await until(lambda: engine.stats().queued_requests == 1)
        assert engine.stats().running_requests == 1
        with pytest.raises(EngineOverloaded):
            await read(engine, request_of())
        await stream.aclose()  # type: ignore[attr-defined]
        assert text_of(await waiting) == "b"


async def test_connections_are_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests after another go through one connection."""
    monkeypatch.setattr("models.engines.remote.engine._DRAIN_S", 60)

    async with BadServer.running(answer("a")) as server, running_engine(server) as engine:
        for _ in range(3):
            await read(engine, request_of())
        assert (len(server.requests), server.num_connections) == (3, 1)


async def test_keys_come_from_the_environment_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file's key is sent without its line end; a missing key is named when the engine starts."""
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)

    async with BadServer.running(answer("a")) as server:
        async with running_engine(server, api_key_file=str(file)) as engine:
            await read(engine, request_of())
            assert KEY not in repr(vars(engine))
        assert server.requests[0]["headers"]["authorization"] == f"Bearer {KEY}"
        for bad in ({"api_key_env": "NO_SUCH_KEY"}, {"api_key_file": str(tmp_path / "no")}):
            with pytest.raises(PoolError, match=next(iter(bad))):
                async with running_engine(server, **bad):
                    pass


@pytest.mark.parametrize("key", ["first\nsecond", "clé", "a\x00b"])
async def test_a_key_that_no_header_holds_is_named_at_the_start(tmp_path: Path, key: str) -> None:
    """And not told: else each request would fail as if the server could not be reached."""
    file = tmp_path / "key"
    file.write_text(key)
    with pytest.raises(PoolError, match=f"api_key_file: {file} holds no key") as refused:
        async with (
            BadServer.running(answer("a")) as server,
            running_engine(server, api_key_file=str(file)),
        ):
            pass
    assert key not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "api.example.com"}, "base_url"),
        ({"timeout": 3}, "timeout: unknown key"),
        ({"api_key_env": "A", "api_key_file": "b"}, "not both"),
        ({"headers": {"Authorization": "Bearer x"}}, "a key belongs into"),
        ({"headers": {"x-a": "b\r\nx-c: d"}}, "headers: 'x-a' is none that HTTP knows"),
        ({"headers": {"x-team": "Käse"}}, "headers: 'x-team' is none that HTTP knows"),
        ({"headers": {"x a": "b"}}, "headers: 'x a' is none that HTTP knows"),
    ],
)
def test_bad_options_name_the_key(options: dict[str, Any], message: str) -> None:
    """A wrong option is refused before anything starts."""
    with pytest.raises(PoolError, match=message):
        engine_traits(spec_of("http://h/v1", **options), remote_models("a"))
