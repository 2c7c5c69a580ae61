"""Encoders on another server: how it is asked for vectors and scores, and what it is believed."""

import asyncio
from typing import Any

import pytest

from models.engines.base import Encoding, GenerationRequest
from models.errors import EngineFailed, RequestError
from tests.models.engines.remote.asking import read, request_of, running_engine
from tests.models.engines.remote.bad_server import BadServer, Reply, answer

ENCODES = {"encodes": ("vector", "score")}


def _encoded(*replies: Reply, **encoding: Any) -> tuple[list[Any], BadServer]:
    """Return what the encoder a tells of `encoding`, and the server that it asked."""

    async def run() -> tuple[list[Any], BadServer]:
        async with (
            BadServer.running(*replies) as server,
            running_engine(server, remote=ENCODES, max_retries=1) as engine,
        ):
            request = request_of(messages=None, encoding=Encoding(**encoding))
            return await read(engine, request), server

    return asyncio.run(run())


def _told(body: Any) -> Reply:
    return Reply(headers={"content-type": "application/json"}, body=body)


def test_vectors_of_another_server() -> None:
    """They are asked for as OpenAI has it, in any order, brought to length one, and counted."""
    body = {
        "data": [{"index": 1, "embedding": [0, -2]}, {"index": 0, "embedding": [3, 4]}],
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    }
    [chunk], server = _encoded(_told(body), inputs=("a", "b"))
    assert chunk.rows.shape == (2, 2)
    assert chunk.rows.ravel().tolist() == pytest.approx([0.6, 0.8, 0, -1])
    assert (chunk.prompt_tokens, chunk.finish_reason) == (5, "stop")
    [asked] = server.requests
    assert asked["path"] == "/v1/embeddings"
    assert asked["body"] == {"model": "up-a", "input": ["a", "b"], "encoding_format": "float"}
    _, server = _encoded(_told(body), inputs=((1, 2), (3,)), cut=True)
    assert server.requests[0]["body"]["input"] == [[1, 2], [3]]
    assert server.requests[0]["body"]["truncate_prompt_tokens"] == -1


@pytest.mark.parametrize("name", ["relevance_score", "score"])
def test_scores_of_another_server(name: str) -> None:
    """They come best first, by Cohere's name or by TEI's, and go out in the documents' order."""
    body = {"results": [{"index": 1, name: 0.9}, {"index": 0, name: 0.25}]}
    [chunk], server = _encoded(_told(body), inputs=("a", "b"), query="q")
    assert chunk.rows.shape == (2, 1)
    assert chunk.rows.ravel().tolist() == pytest.approx([0.25, 0.9])
    assert server.requests[0]["path"] == "/v1/rerank"
    sent = server.requests[0]["body"]
    assert sent == {"model": "up-a", "query": "q", "documents": ["a", "b"]}


@pytest.mark.parametrize(
    "body",
    [
        {"data": [{"index": 0, "embedding": [1, 2]}]},
        {"data": [{"index": i, "embedding": [1] * (i + 1)} for i in range(2)]},
        {"data": [{"index": i, "embedding": None} for i in range(2)]},
        {"data": [{"index": i, "embedding": [10**400, 1]} for i in range(2)]},
        {"data": [{"index": 1e400, "embedding": [0, 1]}] * 2},
        {"results": []},
        [],
    ],
)
def test_what_are_no_vectors_is_asked_for_again(body: Any) -> None:
    """An answer that lacks a row or has none that can be read is the server's failure."""
    good = {"data": [{"embedding": [1, 0]}, {"embedding": [0, 1]}]}
    [chunk], server = _encoded(_told(body), _told(good), inputs=("a", "b"))
    assert chunk.rows.tolist() == [[1, 0], [0, 1]]
    assert len(server.requests) == 2
    with pytest.raises(EngineFailed, match="cannot be read"):
        _encoded(_told(body), inputs=("a", "b"))


@pytest.mark.parametrize("told", [5, 5.0, 2**62, -1, 2.5, True, "5"])
def test_usage_is_believed_as_far_as_it_can_be(told: Any) -> None:
    """Counts that no request can have, and usage that is none, are left out and harm nothing."""
    for usage in ({"prompt_tokens": told}, [told]):
        body = {"data": [{"embedding": [1, 0]}], "usage": usage}
        [chunk], _ = _encoded(_told(body), inputs=("a",))
        known = usage == {"prompt_tokens": 5}
        assert chunk.prompt_tokens == (5 if known else None)


def test_encoders_and_others_are_told_apart() -> None:
    """An encoder writes no answer, and what writes answers tells no vector."""

    async def run(asked: GenerationRequest, **remote: Any) -> None:
        async with (
            BadServer.running(answer("hi")) as server,
            running_engine(server, remote=remote) as engine,
        ):
            with pytest.raises(RequestError, match=r"writes no answers|cannot tell a vector"):
                await read(engine, asked)
            assert not server.requests

    asyncio.run(run(request_of(), **ENCODES))
    asyncio.run(run(request_of(messages=None, encoding=Encoding(inputs=("a",)))))
