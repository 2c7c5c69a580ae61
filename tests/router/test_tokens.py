"""`/tokenize`, `/detokenize`, `/tokenizer_info` and `/version`."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.router.conftest import running
from tests.router.test_encoding import write_encoder


def test_there_and_back(server: Any) -> None:
    """A text's tokens and their text; a conversation's as its answer is charged for."""
    told = server.http.post("/tokenize", json={"model": "alpha", "prompt": "hé"}).json()
    assert (told["tokens"], told["count"]) == (list("hé".encode()), 3)
    model = server.http.get("/v1/models/alpha").json()
    assert told["max_model_len"] == model["max_model_len"] == 8192
    assert model["shoal"]["context_tokens"] == 8192
    back = server.http.post("/detokenize", json={"model": "alpha", "tokens": told["tokens"]})
    assert back.json() == {"prompt": "hé"}
    chat = {"model": "alpha", "messages": [{"role": "user", "content": "hello"}]}
    usage = server.post(**chat).json()["usage"]
    assert server.http.post("/tokenize", json=chat).json()["count"] == usage["prompt_tokens"]
    assert server.http.get("/version").json() == {"version": version("shoal")}


def test_texts_of_tokens_are_told(server: Any, tmp_path: Path) -> None:
    """Where they are asked for, each by itself; and a text without what a tokenizer adds."""
    asked = {"model": "alpha", "prompt": "hé", "return_token_strs": True}
    assert server.http.post("/tokenize", json=asked).json()["token_strs"] == [
        "h",
        "\ufffd",
        "\ufffd",
    ]
    engines = [{"name": "e", "kind": "encoder"}, {"name": "one", "kind": "fake"}]
    models = [
        {"name": "alpha", "engine": "one"},
        {"name": "m", "engine": "e", "checkpoint": str(write_encoder(tmp_path / "m"))},
    ]
    with running(tmp_path, engines=engines, models=models, policies={}) as other:
        text = {"model": "m", "prompt": "x"}
        whole = other.http.post("/tokenize", json=text).json()["tokens"]
        bare = other.http.post("/tokenize", json={**text, "add_special_tokens": False}).json()
        assert bare["tokens"] == whole[1:-1]
        strs = other.http.post("/tokenize", json={**text, "return_token_strs": True}).json()
        assert [strs["token_strs"][place] for place in (0, -1)] == ["[CLS]", "[SEP]"]


def test_a_checkpoints_tokenizer_is_told(tmp_path: Path) -> None:
    """What its tokenizer_config.json says, with the template; a scripted model reads bytes."""
    folder = write_encoder(tmp_path / "m")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    engines = [{"name": "e", "kind": "encoder"}, {"name": "one", "kind": "fake"}]
    models = [
        {"name": "alpha", "engine": "one"},
        {"name": "m", "engine": "e", "checkpoint": str(folder)},
    ]
    with running(tmp_path, engines=engines, models=models, policies={}) as server:
        told = server.http.get("/tokenizer_info", params={"model": "m"}).json()
        assert server.http.get("/tokenizer_info", params={"model": "x"}).status_code == 404
        for params in ({}, {"model": "auto"}):
            facts = server.http.get("/tokenizer_info", params=params).json()
            assert (facts["tokenizer_class"], facts["vocab_size"]) == ("ByteTokenizer", 257)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert {name: told[name] for name in config} == config
    assert told["chat_template"] == "{{ messages }}"


def test_bad_requests_are_named(server: Any) -> None:
    """An unknown model, ids that are none, and a body without a prompt."""
    for path, body, status in (
        ("/tokenize", {"model": "nobody", "prompt": "x"}, 404),
        ("/tokenize", {"model": "alpha"}, 400),
        ("/tokenize", {"model": "alpha", "prompt": "x", "messages": []}, 400),
        ("/detokenize", {"model": "alpha", "tokens": [2**40]}, 400),
        ("/detokenize", {"model": "alpha", "tokens": [65, 257]}, 400),
    ):
        assert server.http.post(path, json=body).status_code == status


def test_what_a_template_refuses_leaves_the_connection_open(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A conversation that cannot be written is the client's fault; nothing is logged as ours."""
    engines = [{"name": "e", "kind": "encoder"}, {"name": "one", "kind": "fake"}]
    models = [
        {"name": "alpha", "engine": "one"},
        {"name": "m", "engine": "e", "checkpoint": str(write_encoder(tmp_path / "m"))},
    ]
    chat = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    with running(tmp_path, engines=engines, models=models, policies={}) as server:
        for path in ("/tokenize", "/v1/messages/count_tokens") * 2:
            answer = server.http.post(path, json=chat)
            assert answer.status_code == 400, path
            assert answer.headers.get("connection") != "close"
    assert not [record for record in caplog.records if record.exc_info]
