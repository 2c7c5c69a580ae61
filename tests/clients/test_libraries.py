"""Every client library works with the shipped pool, in every way in which it can ask."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.clients.conftest import ROOT, Served
from tests.clients.frameworks import LIBRARIES
from tests.clients.libraries import NODE, Feature, Library, OpenAINode
from tests.models.engines.remote.bad_server import Reply, called, finish

QUESTION = "What is 37 + 58?"
NAMES = {library.name: library for library in LIBRARIES}


@pytest.fixture(params=LIBRARIES, ids=list(NAMES))
def library(request: pytest.FixtureRequest, served: Served) -> Library:
    """Each library, with a key that may ask."""
    kind: type[Library] = request.param
    if issubclass(kind, OpenAINode) and not (NODE / "node_modules").is_dir():
        pytest.skip("npm has not installed the libraries for Node")
    return kind(url=served.url, key=served.key)


def _needs(library: Library, feature: Feature) -> None:
    if feature in library.lacks:
        pytest.skip(f"{library.name} is not for {feature}")


def test_answers_come_whole(library: Library, served: Served) -> None:
    """A chunk of the pool answers right; usage counts the prompt as the tokenizer does."""
    _needs(library, "usage")
    told = library.chat("arithmetic", QUESTION)
    assert told.text == "95"
    body = {"model": "arithmetic", "messages": [{"role": "user", "content": QUESTION}]}
    headers = {"authorization": f"Bearer {served.key}"}
    counted = httpx.post(f"{served.url}/tokenize", json=body, headers=headers).json()["count"]
    assert told.prompt_tokens == counted
    assert told.output_tokens == 3  # two digits, and the end


@pytest.mark.parametrize("model", ["auto", "policy/fused", "policy/cascade"])
def test_policies_are_models(library: Library, model: str) -> None:
    """A policy's name works as a model's, whoever answers."""
    _needs(library, "usage")
    assert library.chat(model, QUESTION).text == "95"


def test_answers_stream(library: Library) -> None:
    """A stream tells, in pieces, the answer and the usage that come whole otherwise."""
    _needs(library, "streaming")
    question = "Reverse the list 88, 41, 20."
    whole, streamed = library.chat("lists", question), library.stream("lists", question)
    assert streamed.text == whole.text
    assert (streamed.prompt_tokens, streamed.output_tokens) == (
        whole.prompt_tokens,
        whole.output_tokens,
    )


def test_tools_are_called(library: Library, caller: Served) -> None:
    """A call streams to the client; its result comes back to the model, whose answer is told."""
    _needs(library, "tools")
    assert library.call("caller", QUESTION) == "It is 95."
    asked, again = (request["body"] for request in caller.upstream.requests)
    assert asked["tools"][0]["function"]["name"] == "add"
    assert set(asked["tools"][0]["function"]["parameters"]["properties"]) == {"a", "b"}
    turns = again["messages"]
    [call] = next(turn for turn in turns if turn["role"] == "assistant")["tool_calls"]
    assert (call["id"], call["function"]["name"]) == ("call_1", "add")
    assert turns[-1]["role"] == "tool"
    assert turns[-1]["tool_call_id"] == "call_1"
    assert "95" in str(turns[-1]["content"])


def test_answers_have_a_schema(library: Library) -> None:
    """The library asks for an object of a type and gets one, from a model that knows no JSON."""
    _needs(library, "structured output")
    assert isinstance(library.parse("arithmetic", QUESTION).total, int)


def test_instructor_calls_a_tool_for_its_schema(caller: Served) -> None:
    """In its mode `TOOLS` the schema is a tool that must be called."""
    events = [called("Sum", '{"total": 95}'), *finish("tool_calls")]
    caller.upstream.replies[:] = [Reply(events=events)]
    library = NAMES["instructor"](url=caller.url, key=caller.key)
    assert library.parse("caller", QUESTION).total == 95
    [request] = caller.upstream.requests
    assert request["body"]["tool_choice"]["function"]["name"] == "Sum"


def test_errors_are_the_library_s_own(library: Library, served: Served) -> None:
    """A prompt that is too long, an unknown key and a spent budget are told apart."""
    overflow, unknown, spent = library.errors
    kind = type(library)
    nobody, poor = (kind(url=served.url, key=key) for key in ("sk-nobody", served.spent))
    ask: Callable[[Library, str], Any] = (
        (lambda one, text: one.parse("arithmetic", text))
        if "usage" in library.lacks
        else (lambda one, text: one.chat("arithmetic", text))
    )
    with pytest.raises(overflow, match=r"maximum context length|prompt is too long"):
        ask(library, "word " * 2000)
    for one, error, status in ((nobody, unknown, 401), (poor, spent, 429)):
        with pytest.raises(error) as caught:
            ask(one, QUESTION)
        told: Any = caught.value
        assert getattr(told, "status_code", None) == status or f"code: {status}" in str(told)


def test_the_document_says_what_works() -> None:
    """The table in docs/clients.md has a row per library; only what it lacks is missing."""
    lines = (ROOT / "docs/clients.md").read_text().splitlines()
    head = next(line for line in lines if line.startswith("| library |"))
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    rows = lines[lines.index(head) + 2 :][: len(LIBRARIES)]
    for library, row in zip(LIBRARIES, rows, strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        told = dict(zip(columns, cells, strict=True))
        assert told["library"] == library.name
        assert {name for name, cell in told.items() if cell == "–"} == library.lacks
