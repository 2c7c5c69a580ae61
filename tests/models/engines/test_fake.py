"""The scripted engine does what its script says."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from models.engines.base import Chunk, Engine, GenerationRequest, SamplingOptions
from models.engines.registry import create_engine
from models.errors import (
    ContextOverflow,
    EngineFailed,
    EngineOverloaded,
    PoolError,
    RequestError,
)
from models.spec import EngineSpec, Model, ModelSpec
from models.tokenizer import ByteTokenizer

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Größe?\nJa"}]


def _engine(*, max_queued_requests: int = 8, **options: Any) -> Engine:
    spec = EngineSpec(
        name="e", kind="fake", options=options, max_queued_requests=max_queued_requests
    )
    return create_engine(spec, [Model(spec=ModelSpec(name=n, engine="e"), card=None) for n in "ab"])


def _request(member: str = "a", prompt: str | None = None, **sampling: Any) -> GenerationRequest:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode_chat(CHAT) if prompt is None else tokenizer.encode(prompt)
    return GenerationRequest(
        request_id="r",
        prompt_tokens=tokens,
        members=(member,),
        sampling=SamplingOptions(**sampling),
    )


async def _read(fake: Engine, wanted: GenerationRequest) -> list[Chunk]:
    return [chunk async for chunk in fake.generate(wanted)]


def _text(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def test_echoes_the_last_message() -> None:
    """Without answers the last turn comes back, multi-byte characters whole."""
    chunks = asyncio.run(_read(_engine(), _request()))
    assert _text(chunks) == "Größe?\nJa"
    assert [chunk.finish_reason for chunk in chunks][-2:] == [None, "stop"]
    assert not any("\ufffd" in chunk.text for chunk in chunks)


def test_reads_long_prompts_in_turns_with_others() -> None:
    """While a prompt of a million tokens is compared with the vocabulary, others are served."""
    num_tokens = 1_000_000
    fake = _engine(answers=["x"], context_tokens=2 * num_tokens)

    async def serve() -> int:
        others = 0
        reading = asyncio.create_task(_read(fake, _request(prompt="w" * num_tokens)))
        while not reading.done():
            await asyncio.sleep(0)
            others += 1
        assert _text(reading.result()) == "x"
        return others

    assert asyncio.run(serve()) > 50


@pytest.mark.parametrize("place", [0, 20_000, -1])
def test_refuses_an_unknown_id_wherever_it_stands(place: int) -> None:
    """One id outside of the vocabulary is found in a long prompt, too."""
    tokens = [65] * 40_000
    tokens[place] = ByteTokenizer().vocab_size
    wanted = replace(_request(), prompt_tokens=tuple(tokens))
    with pytest.raises(RequestError, match="the token id 257 is outside of the vocabulary of 257"):
        asyncio.run(_read(_engine(context_tokens=100_000), wanted))


def test_echoes_a_plain_prompt() -> None:
    """A prompt without turns comes back whole."""
    assert _text(asyncio.run(_read(_engine(), _request(prompt="abc")))) == "abc"


def test_answers_in_turn_per_model() -> None:
    """Successive requests to one model take the scripted answers in turn."""
    fake = _engine(answers=["one", "two"], models={"b": {"answers": ["bee"]}})
    names = ["a", "b", "a", "a"]
    texts = [_text(asyncio.run(_read(fake, _request(name)))) for name in names]
    assert texts == ["one", "bee", "two", "one"]


@pytest.mark.parametrize(
    ("stop", "expected"), [(("t w",), "firs"), (("x", "second"), "first words")]
)
def test_stop_strings_cut_across_tokens(stop: tuple[str, ...], expected: str) -> None:
    """A stop string ends the answer before it, and a mere beginning of one does not."""
    chunks = asyncio.run(_read(_engine(answers=["first words"]), _request(stop=stop)))
    assert _text(chunks) == expected
    assert chunks[-1].finish_reason == "stop"


def test_max_tokens_and_ignore_eos() -> None:
    """The answer ends at max_tokens with "length"; ignore_eos repeats it until then."""
    chunks = asyncio.run(_read(_engine(answers=["ab"]), _request(max_tokens=5, ignore_eos=True)))
    assert _text(chunks) == "ababa"
    assert chunks[-1].finish_reason == "length"


def test_logprobs_have_the_asked_alternatives() -> None:
    """Each token carries the scripted log-probability and as many alternatives as asked for."""
    [first, *_] = asyncio.run(_read(_engine(answers=["x"], logprob=-2), _request(top_logprobs=3)))
    [token] = first.tokens
    assert (token.logprob, token.raw, len(token.top)) == (-2, b"x", 3)
    assert token.top[0].token_id == token.token_id


async def test_fails_as_scripted() -> None:
    """The first requests fail after so many tokens, later ones succeed."""
    fake = _engine(answers=["abc"], fail_after_tokens=2, num_failures=1)
    seen = []
    with pytest.raises(EngineFailed, match="after 2 tokens"):
        async for chunk in fake.generate(_request()):
            seen.append(chunk.text)  # noqa: PERF401 - the loop raises
    assert seen == ["a", "b"]
    assert _text(await _read(fake, _request())) == "abc"
    assert fake.stats().running_requests == 0


def test_refuses_as_scripted() -> None:
    """A refusing script raises EngineOverloaded with a time to come back."""
    with pytest.raises(EngineOverloaded) as caught:
        asyncio.run(_read(_engine(refuse=True), _request()))
    assert caught.value.retry_after_s > 0


async def test_queue_is_bounded_and_cancelling_frees_lanes() -> None:
    """One runs, one waits, the third is refused; closing the stream frees the lane at once."""
    fake = _engine(
        answers=["x" * 100],
        token_latency_s=0.01,
        max_running_requests=1,
        max_queued_requests=1,
    )
    stream = fake.generate(_request())
    await anext(stream)
    waiting = asyncio.create_task(_read(fake, _request(max_tokens=1)))
    await asyncio.sleep(0)
    stats = fake.stats()
    assert (stats.running_requests, stats.queued_requests, stats.active_lanes) == (1, 1, 1)
    with pytest.raises(EngineOverloaded):
        await anext(fake.generate(_request()))
    await stream.aclose()  # type: ignore[attr-defined]
    await waiting
    assert fake.stats().active_lanes == 0


def test_refuses_what_it_cannot_run() -> None:
    """Unknown members, foreign token ids and overlong prompts are the client's errors."""
    fake = _engine(context_tokens=10)
    for bad, error in (
        (_request("c"), RequestError),
        (_request(prompt="abcdefghij"), ContextOverflow),
        (GenerationRequest(request_id="r", prompt_tokens=(999,), members=("a",)), RequestError),
    ):
        with pytest.raises(error):
            asyncio.run(_read(fake, bad))


async def test_stopping_fails_what_runs() -> None:
    """After stop, running requests fail and the health check says so."""
    fake = _engine(answers=["abc"])
    stream = fake.generate(_request())
    await anext(stream)
    await fake.stop()
    with pytest.raises(EngineFailed):
        await anext(stream)
    with pytest.raises(EngineFailed):
        fake.check_health()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_latency": 1}, "options: token_latency: unknown key"),
        ({"logprob": 1}, "logprob"),
        ({"models": {"zed": {}}}, "'zed' is unknown; allowed are a, b"),
    ],
)
def test_bad_options_name_the_key(options: dict[str, Any], message: str) -> None:
    """A wrong option is refused with its name."""
    with pytest.raises(PoolError, match=message):
        _engine(**options)
