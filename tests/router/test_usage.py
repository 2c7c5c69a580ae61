"""Usage is what the model that answered read, whichever model the pool has first."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoTokenizer

from models.pool import DEFAULT_POOL
from tests.router.conftest import Running, running

QUESTION = "What is 37 + 58?"
MESSAGES = [{"role": "user", "content": QUESTION}]
CHECKPOINT = DEFAULT_POOL / "arithmetic"
# The first rejects all that it is not sure of, so that the second answers.
CASCADE = {
    "cascade": {
        "stages": ["alpha", "arithmetic"],
        "thresholds": [1.0],
        "scorer": "confidence",
    }
}


@pytest.fixture(scope="module", name="mixed")
def mixed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose first model reads bytes; its policies let the second one answer."""
    pool = {
        "engines": [
            {"name": "one", "kind": "fake", "options": {"context_tokens": 512}},
            {"name": "two", "kind": "stacked", "device": "cpu", "kv_memory_bytes": 2**24},
        ],
        "models": [
            {"name": "alpha", "engine": "one"},
            {"name": "arithmetic", "engine": "two", "checkpoint": str(CHECKPOINT)},
        ],
        "policies": {
            "auto": {"kind": "fixed", "plan": "arithmetic"},
            "climb": {"kind": "fixed", "plan": CASCADE},
            "thrifty": {"kind": "budgeted", "policy": {"kind": "fixed", "plan": "arithmetic"}},
        },
    }
    with running(tmp_path_factory.mktemp("mixed"), **pool) as server:
        yield server


@pytest.fixture(scope="module")
def expected() -> int:
    """How many tokens the question has for the second model, by transformers."""
    told = AutoTokenizer.from_pretrained(CHECKPOINT).apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_dict=True
    )
    return len(told["input_ids"])


def events(server: Running, path: str, **body: Any) -> list[Any]:
    """Return the data of a stream's events."""
    text = server.http.post(path, json={"max_tokens": 3, "stream": True, **body}).text
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize("model", ["arithmetic", "auto", "policy/climb", "policy/thrifty"])
def test_every_endpoint_counts_as_who_answered_read(
    mixed: Running, expected: int, model: str
) -> None:
    """Whole and streamed, in three dialects, and where it is only counted; so does the record."""
    mixed.forget()
    asked: dict[str, Any] = {"model": model, "messages": MESSAGES}
    assert mixed.post(**asked, max_tokens=3).json()["usage"]["prompt_tokens"] == expected
    assert mixed.last_record().prompt_tokens == expected
    options = {"include_usage": True, "continuous_usage_stats": True}
    streamed = events(mixed, "/v1/chat/completions", **asked, stream_options=options)
    assert {chunk["usage"]["prompt_tokens"] for chunk in streamed} == {expected}
    assert streamed[0]["usage"]["completion_tokens"] == 0
    first, *_, last, _ = events(mixed, "/v1/messages", **asked)
    assert first["message"]["usage"]["input_tokens"] == expected
    assert last["usage"]["input_tokens"] == expected
    body = {"model": model, "input": QUESTION, "max_output_tokens": 3}
    told = mixed.post("/v1/responses", **body).json()
    assert told["usage"]["input_tokens"] == expected
    counted = mixed.post("/v1/messages/count_tokens", **asked).json()
    # Which stage of a cascade answers is not known before; the first one's tokens are more.
    climbs = model == "policy/climb"
    assert climbs == (counted["input_tokens"] > expected)
    assert climbs or counted == {"input_tokens": expected}


def test_texts_are_counted_once_each(mixed: Running) -> None:
    """A completion of two texts, three choices each, has read each text once."""
    texts = ["37 + 58 =", "one two three"]
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    body = {"model": "auto", "prompt": texts, "n": 3, "max_tokens": 2, "temperature": 1}
    usage = mixed.post("/v1/completions", **body).json()["usage"]
    assert usage["prompt_tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    assert usage["completion_tokens"] <= 12


def test_a_text_fits_whom_it_fits(mixed: Running) -> None:
    """No token of the first model's is longer than a byte, so its context would be too short."""
    text = "What is 37 plus 58? " * 60
    told = mixed.post(model="auto", messages=[{"role": "user", "content": text}], max_tokens=1)
    assert told.status_code == 200, told.text
    assert told.json()["usage"]["prompt_tokens"] < 1024 < len(text)
