"""Members that another server runs, from a client's point of view; the other one is real too."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from models.pool import DEFAULT_POOL
from tests.router.conftest import Running, running

LONG = {"answers": ["x" * 1000], "token_latency_s": 0.2}
LOCAL = {"name": "near", "kind": "fake", "options": {"answers": ["42"], "logprob": -2}}
MODELS = [
    {"name": "small", "engine": "near"},
    {
        "name": "big",
        "engine": "far",
        "remote": {"model": "gamma"},
        "usd_per_million_input_tokens": 3,
        "usd_per_million_output_tokens": 15,
    },
    {"name": "endless", "engine": "far", "remote": {"model": "beta"}},
    {"name": "sized", "engine": "far", "remote": {"model": "gamma", "parameters": 1_000_000}},
]
CASCADE = {"cascade": {"stages": ["small", "big"], "thresholds": [0.5]}}


@pytest.fixture(scope="module", name="upstream")
def upstream_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose `beta` never ends and whose `gamma` repeats what it is asked."""
    engines = [
        {"name": "one", "kind": "fake", "options": {"models": {"beta": LONG}}},
        {"name": "two", "kind": "fake"},
    ]
    with running(tmp_path_factory.mktemp("upstream"), engines=engines) as server:
        yield server


@pytest.fixture(scope="module", name="front")
def front_server(upstream: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with one model of its own, and three of the other one's."""
    with running(tmp_path_factory.mktemp("front"), **_pool(upstream)) as server:
        yield server


def _pool(upstream: Running, **options: Any) -> dict[str, Any]:
    far = {"base_url": f"{upstream.url}/v1", **options}
    return {
        "engines": [LOCAL, {"name": "far", "kind": "remote", "options": far}],
        "models": MODELS,
        "policies": {"auto": {"kind": "fixed", "plan": CASCADE}},
    }


def test_a_cascade_ends_at_a_remote_model(front: Running) -> None:
    """The unsure local answer is rejected, the remote one comes, and the price is its server's."""
    front.forget()
    answer = front.chat("The answer is 42.", "auto")
    assert answer.choices[0].message.content == "The answer is 42."
    shoal = answer.shoal
    assert shoal["members"] == ["big"]
    read, written = shoal["tokens"]["big"]["prompt"], shoal["tokens"]["big"]["output"]
    assert (read, written) == (
        len("user\nThe answer is 42.assistant\n") + 1,
        len("The answer is 42.") + 1,
    )
    assert shoal["cost"]["usd"] == pytest.approx((3 * read + 15 * written) / 1e6)
    stages = front.last_record().stages
    assert [stage["outcome"] for stage in stages if "members" in stage] == ["rejected", "ok"]


def test_streams_with_logprobs(front: Running) -> None:
    """Text and log-probabilities of the other server arrive as they come."""
    stream = front.chat("hello", "big", stream=True, logprobs=True, top_logprobs=2)
    choices = [chunk.choices[0] for chunk in stream if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices) == "hello"
    items = [item for choice in choices if choice.logprobs for item in choice.logprobs.content]
    assert [item.token for item in items] == list("hello")
    assert {len(item.top_logprobs) for item in items} == {2}
    assert choices[-1].finish_reason == "stop"


def test_texts_and_options_pass_through(front: Running) -> None:
    """A plain completion reaches the other server's completions, with its stop string."""
    done = front.client.completions.create(model="big", prompt="one two three", stop=[" three"])
    assert done.choices[0].text == "one two"
    assert done.choices[0].finish_reason == "stop"


def test_a_text_is_scored_upstream(front: Running, upstream: Running) -> None:
    """The other server's likelihoods of a text are told as if its models ran here."""
    asked: Any = {"prompt": "añb", "echo": True, "logprobs": 2, "max_tokens": 0}
    here = front.client.completions.create(model="big", **asked)
    there = upstream.client.completions.create(model="gamma", **asked)
    assert here.choices[0].text == there.choices[0].text == "añb"
    assert here.choices[0].logprobs == there.choices[0].logprobs
    told = here.choices[0].logprobs
    assert told is not None
    assert told.token_logprobs is not None
    assert [told.token_logprobs[0], len(told.token_logprobs)] == [None, len("añb".encode())]
    more = front.client.completions.create(model="big", **{**asked, "max_tokens": 9})
    assert more.choices[0].text == "añb" + "añb"
    assert (
        more.usage
        == upstream.client.completions.create(model="gamma", **{**asked, "max_tokens": 9}).usage
    )


def test_hanging_up_ends_the_work_upstream(front: Running, upstream: Running) -> None:
    """When our client leaves, the other server's lanes are free shortly after."""
    stream = front.chat("hello", "endless", stream=True)
    next(iter(stream))
    one = upstream.service.engines["one"]
    upstream.wait(lambda: one._engine.stats().active_lanes == 1)  # type: ignore[attr-defined]
    stream.close()
    # Long before the answer would have ended.
    upstream.wait(lambda: one._engine.stats().active_lanes == 0)  # type: ignore[attr-defined]


def test_footprints_say_what_is_unknown(front: Running) -> None:
    """Nobody knows what a remote model draws: its energy is no figure, and its method says so."""
    footprint = front.chat("hi", "big").shoal["footprint"]
    assert (footprint["wh"], footprint["method"]) == (0, "unknown")
    assert front.chat("hi", "sized").shoal["footprint"]["method"] == "unknown"


def test_health_shows_the_circuit(front: Running) -> None:
    """The engine's state stands beside the others'."""
    engines = front.http.get("/health").json()["engines"]
    assert engines["far"]["circuit"] == "closed"
    assert engines["near"]["circuit"] is None


def test_a_server_that_is_away(tmp_path: Path, upstream: Running) -> None:
    """Its models answer 503, the circuit opens, health stays good, and a cascade falls back on
    its best rejected answer.
    """
    pool = _pool(upstream, breaker_failures=1, backoff_s=0.01, breaker_open_s=3600)
    pool["engines"][1]["options"]["base_url"] = "http://127.0.0.1:9/v1"
    with running(tmp_path, **pool) as server:
        with pytest.raises(openai.InternalServerError) as caught:
            server.chat("hi", "big")
        assert caught.value.status_code == 503
        assert server.chat("hi", "auto").choices[0].message.content == "42"
        health = server.http.get("/health")
        assert (health.status_code, health.json()["engines"]["far"]["circuit"]) == (200, "open")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"cascade": {"stages": ["big", "small"], "thresholds": [0.5]}}, "judges answers of 'big'"),
        ({"answer": {"members": ["big", "small"]}}, "fuses 'big'"),
    ],
)
def test_plans_that_need_logprobs_are_refused(
    tmp_path: Path, upstream: Running, plan: Any, message: str
) -> None:
    """What a server without log-probabilities cannot take part in is refused by name, with 400."""
    with running(tmp_path, **_pool(upstream, logprobs=False)) as server:
        with pytest.raises(openai.BadRequestError, match=message):
            server.chat("hi", "auto", extra_body={"shoal": {"plan": plan}})
        assert server.chat("hi", "big").choices[0].message.content == "hi"


def test_fusing_needs_a_known_tokenizer(front: Running) -> None:
    """A remote model without one cannot be fused, not even with another of its server."""
    for members in (["big", "small"], ["big", "sized"]):
        plan = {"answer": {"members": members}}
        with pytest.raises(openai.BadRequestError, match=r"models\.big\.remote\.tokenizer"):
            front.chat("hi", "auto", extra_body={"shoal": {"plan": plan}})


def test_what_another_model_s_template_refuses_is_answered(
    tmp_path: Path, upstream: Running
) -> None:
    """Policies count by the pool's first tokenizer; that its template knows no tools stops none."""
    toy = {
        "name": "toy",
        "engine": "far",
        "remote": {"tokenizer": str(DEFAULT_POOL / "arithmetic")},
    }
    pool = _pool(upstream) | {"models": [toy, *MODELS]}
    function = {"name": "add", "arguments": "{}"}
    call = {"id": "call_1", "type": "function", "function": function}
    messages = [
        {"role": "user", "content": "What is 2 + 3?"},
        {"role": "assistant", "content": "I add.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "5"},
    ]
    with running(tmp_path, **pool) as server:
        answer = server.chat(model="big", messages=messages)
        assert answer.choices[0].message.content == "5"
        with pytest.raises(openai.BadRequestError, match="the chat template refuses them"):
            server.chat(model="toy", messages=messages)
        used = {"type": "tool_use", "id": "call_1", "name": "add", "input": {}}
        result = {"type": "tool_result", "tool_use_id": "call_1", "content": "5"}
        turns = [
            {"role": "user", "content": "What is 2 + 3?"},
            {"role": "assistant", "content": [used]},
            {"role": "user", "content": [result]},
        ]
        counted = server.post("/v1/messages/count_tokens", model="auto", messages=turns)
        assert counted.json()["input_tokens"] > 0
