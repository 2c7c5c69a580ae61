"""What a model thinks before it answers, through every endpoint that tells of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from router.anthropic_api.request import read_messages
from router.openai_api.responses_request import read_response_fields, response_ask
from tests.router.conftest import Running, running

SAID = "<think>\nTwo and two.\n</think>\n\nFour."
THOUGHT, TEXT = "Two and two.", "Four."
NUM_THOUGHTS = len("<think>\nTwo and two.\n</think>")  # a token is a byte


@pytest.fixture(name="front")
def thinking_server(tmp_path: Path) -> Iterator[Running]:
    """A scripted model that thinks, and a vote over three of its answers."""
    with running(
        tmp_path,
        engines=[{"name": "near", "kind": "fake", "options": {"answers": [SAID]}}],
        models=[
            {
                "name": "thinker",
                "engine": "near",
                "reasoning": {"open": "<think>", "close": "</think>"},
            },
            {"name": "plain", "engine": "near", "reasoning": False},
        ],
        policies={"auto": {"kind": "fixed", "plan": {"best": {"candidates": ["thinker"]}}}},
    ) as server:
        yield server


@pytest.mark.parametrize("model", ["thinker", "auto"])
def test_chat_tells_thoughts_apart(front: Running, model: str) -> None:
    """By both names, beside the content; they count in the usage, and the record has them."""
    front.forget()
    answer = front.chat(model=model).model_dump()
    message = answer["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == (TEXT, THOUGHT)
    assert message["reasoning_content"] == THOUGHT
    details = answer["usage"]["completion_tokens_details"]
    assert details["reasoning_tokens"] == NUM_THOUGHTS
    assert answer["usage"]["completion_tokens"] == len(SAID) + 1
    assert front.last_record().reasoning_tokens == NUM_THOUGHTS


def test_thoughts_stream(front: Running) -> None:
    """They come in deltas of their own, before the content; logprobs are the content's."""
    chunks = list(front.chat(model="thinker", stream=True, logprobs=True))
    deltas = [choice.delta.model_dump() for chunk in chunks for choice in chunk.choices]
    assert "".join(delta.get("reasoning") or "" for delta in deltas) == THOUGHT
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == THOUGHT
    assert "".join(delta.get("content") or "" for delta in deltas) == TEXT
    told = [c.logprobs for chunk in chunks for c in chunk.choices if c.logprobs is not None]
    shown = "".join(item.token for one in told for item in one.content)
    assert shown.endswith(TEXT)
    assert THOUGHT not in shown


def test_who_does_not_want_them_gets_none(front: Running) -> None:
    """`include_reasoning` false leaves them out; a model without tags writes text only."""
    answer = front.chat(model="thinker", extra_body={"include_reasoning": False})
    assert "reasoning" not in answer.choices[0].message.model_dump()
    assert front.chat(model="plain").choices[0].message.content == SAID


def test_a_response_has_an_item_of_reasoning(front: Running) -> None:
    """OpenAI's newer API tells of thoughts as an item before the message."""
    body: dict[str, Any] = {"model": "thinker", "input": "2 + 2?", "reasoning": {"effort": "low"}}
    answer = front.http.post("/v1/responses", json=body).json()
    thoughts, message = answer["output"]
    assert thoughts["content"] == [{"type": "reasoning_text", "text": THOUGHT}]
    assert message["content"][0]["text"] == TEXT
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] == NUM_THOUGHTS


def test_a_message_has_a_block_of_thinking(front: Running) -> None:
    """Anthropic's API streams thoughts as a block before the text."""
    body: dict[str, Any] = {
        "model": "thinker",
        "max_tokens": 100,
        "stream": True,
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "messages": [{"role": "user", "content": "2 + 2?"}],
    }
    lines = front.http.post("/v1/messages", json=body).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    kinds = [e["content_block"]["type"] for e in events if e["type"] == "content_block_start"]
    assert kinds == ["thinking", "text"]
    deltas = [e["delta"] for e in events if e["type"] == "content_block_delta"]
    assert "".join(d.get("thinking", "") for d in deltas) == THOUGHT
    assert "".join(d.get("text", "") for d in deltas) == TEXT


def test_how_hard_to_think_reaches_the_template() -> None:
    """In each API's own words; servers elsewhere are sent no field that the client did not."""
    asked = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    ask = read_messages(json.dumps({**asked, "thinking": {"type": "disabled"}}).encode())
    assert ask.prompts[0].rendering is not None
    assert ask.prompts[0].rendering.arguments == {"enable_thinking": False}
    assert ask.sent is not None
    assert "chat_template_kwargs" not in ask.sent
    body = json.dumps({"model": "m", "input": "hi", "reasoning": {"effort": "none"}}).encode()
    ask = response_ask(read_response_fields(body, can_store=False), store=False)
    assert ask.prompts[0].rendering is not None
    assert ask.prompts[0].rendering.arguments == {
        "reasoning_effort": "none",
        "enable_thinking": False,
    }
