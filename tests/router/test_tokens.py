"""`/tokenize`, `/detokenize` and `/version`."""

from importlib.metadata import version
from typing import Any


def test_there_and_back(server: Any) -> None:
    """A text's tokens and their text; a conversation's as its answer is charged for."""
    told = server.http.post("/tokenize", json={"model": "alpha", "prompt": "hé"}).json()
    assert (told["tokens"], told["count"]) == (list("hé".encode()), 3)
    assert told["max_model_len"] == 8192
    back = server.http.post("/detokenize", json={"model": "alpha", "tokens": told["tokens"]})
    assert back.json() == {"prompt": "hé"}
    chat = {"model": "alpha", "messages": [{"role": "user", "content": "hello"}]}
    usage = server.post(**chat).json()["usage"]
    assert server.http.post("/tokenize", json=chat).json()["count"] == usage["prompt_tokens"]
    assert server.http.get("/version").json() == {"version": version("shoal")}


def test_bad_requests_are_named(server: Any) -> None:
    """An unknown model, ids that are none, and a body without a prompt."""
    for path, body, status in (
        ("/tokenize", {"model": "nobody", "prompt": "x"}, 404),
        ("/tokenize", {"model": "alpha"}, 400),
        ("/detokenize", {"model": "alpha", "tokens": [2**40]}, 400),
    ):
        assert server.http.post(path, json=body).status_code == status
