"""The OpenAPI document: written down in docs/openapi.json, and true of what is served."""

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from tests.router.conftest import Running, running
from tests.router.test_encoding import write_encoder

WRITTEN = Path(__file__).parents[2] / "docs" / "openapi.json"
CHAT = {"model": "alpha", "messages": [{"role": "user", "content": "hello"}]}
EXPERIMENT = {"arms": {name: {"policy": name, "weight": 0.5} for name in ("auto", "other")}}
SHADOW = {"policy": "other", "share": 1.0, "usd_per_day": 1.0, "concurrency": 4}


@pytest.fixture(name="document", scope="module")
def served_document(shared: Running) -> dict[str, Any]:
    """The document as it is served."""
    found: dict[str, Any] = shared.http.get("/openapi.json").json()
    return found


def test_it_is_as_written_down(document: dict[str, Any]) -> None:
    """docs/openapi.json is what is served; RENEW=1 writes it anew, for a person to read."""
    text = json.dumps(document, indent=1, sort_keys=True) + "\n"
    if os.environ.get("RENEW"):
        WRITTEN.write_text(text)
    assert text == WRITTEN.read_text(), "if it should be: RENEW=1 pytest tests/router/test_openapi"


def test_every_operation_is_typed(document: dict[str, Any]) -> None:
    """Answers, errors and bodies have schemas with names; every reference leads to one."""
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for told in operation["responses"].values():
                assert told["content"], (path, method)
            typed = [*_schemas(operation)]
            takes = "requestBody" in operation
            assert len(typed) >= 2 + takes, (path, method)
            assert all(schema != {} for schema in typed), (path, method)
    references = set(_references(document))
    assert references
    for reference in references:
        assert reference.rpartition("/")[2] in document["components"]["schemas"], reference


def _schemas(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        if "schema" in node:
            yield node["schema"]
        for value in node.values():
            yield from _schemas(value)


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


@pytest.fixture(name="check")
def checker(document: dict[str, Any]) -> Callable[..., None]:
    """Return what holds an answer to its operation's schema; fields that it does not name fail."""
    strict = copy.deepcopy(document)
    for schema in strict["components"]["schemas"].values():
        if "properties" in schema:
            schema["additionalProperties"] = False

    def check(
        answer: Any,
        path: str,
        *,
        method: str = "get",
        kind: str = "application/json",
        status: str = "200",
    ) -> None:
        told = strict["paths"][path][method]["responses"][status]["content"][kind]["schema"]
        Draft202012Validator({**strict, **told}).validate(answer)

    return check


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {**CHAT, "shoal": {"explain": True}}),
        ("/v1/chat/completions", {**CHAT, "n": 2, "logprobs": True, "top_logprobs": 2}),
        ("/v1/completions", {"model": "beta", "prompt": "hi", "logprobs": 2, "echo": True}),
        ("/v1/responses", {"model": "auto", "input": "hello", "max_output_tokens": 2}),
        ("/v1/messages", {**CHAT, "max_tokens": 3}),
    ],
)
def test_answers_and_streams_are_as_described(
    server: Running, check: Callable[..., None], path: str, body: dict[str, Any]
) -> None:
    """Whole answers and every event of streams have the fields of their schemas and no others."""
    check(server.http.post(path, json=body).json(), path, method="post")
    more = (
        {}
        if path in ("/v1/messages", "/v1/responses")
        else {"stream_options": {"include_usage": True}}
    )
    streamed = server.http.post(path, json={**body, "stream": True, **more})
    events = [
        json.loads(line.removeprefix("data: "))
        for line in streamed.text.splitlines()
        if line.startswith("data: ") and line != "data: [DONE]"
    ]
    assert len(events) > 2
    for event in events:
        check(event, path, method="post", kind="text/event-stream")
    refused = server.http.post(path, json={**body, "model": "nobody"})
    assert refused.status_code == 404
    check(refused.json(), path, method="post", status="default")


def test_facts_are_as_described(server: Running, check: Callable[..., None]) -> None:
    """Names, tokens, version, health, feedback."""
    for path in (
        "/v1/models",
        "/version",
        "/tokenizer_info",
        "/health",
        "/v1/experiments",
        "/v1/shadows",
    ):
        check(server.http.get(path).json(), path)
    for name in ("auto", "alpha"):
        check(server.http.get(f"/v1/models/{name}").json(), "/v1/models/{name}")
    for path, body in (
        ("/tokenize", CHAT),
        ("/detokenize", {"model": "alpha", "tokens": [104, 105]}),
        ("/v1/messages/count_tokens", CHAT),
        ("/v1/feedback", {"id": server.chat().id, "thumb": "up"}),
    ):
        check(server.http.post(path, json=body).json(), path, method="post")


def test_files_and_batches_are_as_described(server: Running, check: Callable[..., None]) -> None:
    """A file, a batch over it, lists of both, and their ends."""
    form = {"files": {"file": b"not a batch"}, "data": {"purpose": "batch"}}
    file = server.http.post("/v1/files", **form).json()
    check(file, "/v1/files", method="post")
    asked = {
        "input_file_id": file["id"],
        "endpoint": "/v1/completions",
        "completion_window": "24h",
    }
    batch = server.http.post("/v1/batches", json=asked).json()
    check(batch, "/v1/batches", method="post")
    server.wait(lambda: _batch(server, batch["id"])["status"] == "failed")
    check(_batch(server, batch["id"]), "/v1/batches/{batch_id}")
    for path in ("/v1/files", "/v1/batches"):
        check(server.http.get(path).json(), path)
    gone = server.http.delete(f"/v1/files/{file['id']}").json()
    check(gone, "/v1/files/{file_id}", method="delete")


def _batch(server: Running, batch_id: str) -> Any:
    return server.http.get(f"/v1/batches/{batch_id}").json()


def test_vectors_and_rankings_are_as_described(tmp_path: Path, check: Callable[..., None]) -> None:
    """Vectors in both formats, and a ranking."""
    engines = [{"name": "one", "kind": "encoder"}]
    models = [{"name": "m", "engine": "one", "checkpoint": str(write_encoder(tmp_path / "m"))}]
    with running(tmp_path, engines=engines, models=models, policies={}) as server:
        for encoding_format in ("float", "base64"):
            body = {"input": ["a cat", "mat"], "encoding_format": encoding_format}
            told = server.post("/v1/embeddings", **body, model="m").json()
            check(told, "/v1/embeddings", method="post")
        told = server.post("/v1/rerank", query="a", documents=["cat"], model="auto").json()
        check(told, "/v1/rerank", method="post")


def test_kept_responses_are_as_described(
    serve: Callable[..., Running], check: Callable[..., None]
) -> None:
    """A kept response, its items, and its end."""
    server = serve(app={"responses": {"store": "unless_refused"}})
    kept = server.post("/v1/responses", input="hello").json()
    path = "/v1/responses/{response_id}"
    for more in ("", "/input_items"):
        check(server.http.get(f"/v1/responses/{kept['id']}{more}").json(), f"{path}{more}")
    check(server.http.delete(f"/v1/responses/{kept['id']}").json(), path, method="delete")


def test_experiments_are_as_described(
    serve: Callable[..., Running], check: Callable[..., None]
) -> None:
    """A report has its numbers, null where they are not known; a shadow what it found."""
    server = serve(
        policies={
            "auto": {"kind": "fixed", "plan": "alpha"},
            "other": {"kind": "fixed", "plan": "beta"},
        },
        app={
            "experiments": {"trial": EXPERIMENT},
            "shadows": {"beside": SHADOW},
        },
    )
    server.chat(model="auto")
    server.settle()
    for path in ("/v1/experiments", "/v1/shadows"):
        answer = server.http.get(path).json()
        assert len(answer["data"]) == 1
        check(answer, path)
    check(server.http.get("/v1/experiments/trial").json(), "/v1/experiments/{name}")
