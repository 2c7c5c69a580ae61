"""A chunk leads an answer of its base, token by token: which engine runs it, and what it costs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from models.errors import PoolError
from models.pool import load_pool
from policies.errors import PolicyError
from router.catalog.catalog import load_catalog
from tests.models.engines.stacked.tiny import save_checkpoint
from tests.router.conftest import Running, running

ENGINES: list[dict[str, Any]] = [
    {"name": "chunks", "kind": "stacked", "device": "cpu", "kv_memory_bytes": 2**20},
    {"name": "whole", "kind": "stacked", "device": "cpu", "kv_memory_bytes": 2**20},
]
LED = [ENGINES[0], {**ENGINES[1], "leads": ["chunk"]}]
PRICES = {"usd_per_million_input_tokens": 1.0, "usd_per_million_output_tokens": 10.0}
PROMPT = "hello world, the quick brown fox"


def spec(gate: float) -> dict[str, Any]:
    """The policy."""
    return {"kind": "speculative", "leads": ["chunk"], "base": "base", "gate": gate}


def models(folder: Path) -> list[dict[str, Any]]:
    """A chunk, and a base that is larger and ten times as dear."""
    save_checkpoint(folder / "chunk", num_hidden_layers=1)
    save_checkpoint(folder / "base", seed=1)
    dear = {key: 10 * value for key, value in PRICES.items()}
    return [
        {"name": "chunk", "engine": "chunks", "checkpoint": str(folder / "chunk"), **PRICES},
        {"name": "base", "engine": "whole", "checkpoint": str(folder / "base"), **dear},
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A pool whose base can be led, by a chunk that also answers alone."""
    folder = tmp_path_factory.mktemp("led")
    policies = {"auto": spec(0.5), "sure": spec(0.0), "unsure": spec(1.0)}
    with running(folder, engines=LED, models=models(folder), policies=policies) as found:
        yield found


def ask(server: Running, model: str, **body: Any) -> dict[str, Any]:
    """A completion of six tokens, explained."""
    reply = server.http.post(
        "/v1/completions",
        json={"model": model, "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
        | {"shoal": {"explain": True}, "ignore_eos": True}
        | body,
    )
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def test_the_bases_engine_runs_it(server: Running) -> None:
    """`explain` names the engine, and what who follows has read and written."""
    told = ask(server, "policy/unsure")
    [stage] = told["shoal"]["stages"]
    assert (stage["engine"], stage["members"]) == ("whole", ["chunk", "base"])
    num_prompt = told["usage"]["prompt_tokens"]
    assert stage["followed_tokens"] == {"read": num_prompt, "written": 6}
    assert told["usage"]["completion_tokens"] == 6


def test_who_is_not_asked_is_not_paid(server: Running) -> None:
    """A chunk that is always sure costs what it costs alone, and says the same; one that never is
    has its base say everything, and both are charged.
    """
    alone, base = ask(server, "chunk"), ask(server, "base")
    sure, unsure = ask(server, "policy/sure"), ask(server, "policy/unsure")
    assert sure["choices"][0]["text"] == alone["choices"][0]["text"]
    assert unsure["choices"][0]["text"] == base["choices"][0]["text"]
    usd = {
        name: told["shoal"]["footprint"]["usd"]
        for name, told in (("alone", alone), ("base", base), ("sure", sure), ("unsure", unsure))
    }
    assert usd["sure"] == pytest.approx(usd["alone"])
    assert usd["unsure"] == pytest.approx(usd["alone"] + usd["base"])


def test_a_text_has_a_likelihood(server: Running) -> None:
    """It is the chunk's where that is always sure, the base's where it never is, and each of the
    two's somewhere between; both read all of it, and are paid.
    """
    scored = {"echo": True, "logprobs": 1, "max_tokens": 0}
    names = ("chunk", "base", "policy/sure", "policy/unsure", "policy/auto")
    told = {name: ask(server, name, **scored) for name in names}
    first, *said = zip(
        *(told[name]["choices"][0]["logprobs"]["token_logprobs"] for name in names), strict=True
    )
    assert set(first) == {None}
    assert said
    for chunk, base, sure, unsure, auto in said:
        assert sure == pytest.approx(chunk, abs=1e-4)
        assert unsure == pytest.approx(base, abs=1e-4)
        assert auto in (pytest.approx(chunk, abs=1e-4), pytest.approx(base, abs=1e-4))
    for name in names[2:]:
        [stage] = told[name]["shoal"]["stages"]
        num_prompt = told[name]["usage"]["prompt_tokens"]
        assert stage["followed_tokens"] == {"read": num_prompt, "written": 0}
        assert told[name]["usage"]["completion_tokens"] == stage["output_tokens"] == 0
        usd = [told[one]["shoal"]["footprint"]["usd"] for one in ("chunk", "base", name)]
        assert usd[2] == pytest.approx(usd[0] + usd[1])


def test_what_cannot_lead_is_refused_by_name(tmp_path: Path) -> None:
    """Another engine's model leads only where its engine says so, and only models do."""
    content = {"name": "p", "engines": ENGINES, "models": models(tmp_path)}

    def load(engines: list[dict[str, Any]]) -> None:
        (tmp_path / "pool.yaml").write_text(
            yaml.safe_dump({**content, "engines": engines, "policies": {"auto": spec(0.5)}})
        )
        load_catalog(load_pool(tmp_path))

    load(LED)
    with pytest.raises(PolicyError, match=r"one of engines\.whole\.leads: nobody"):
        load(ENGINES)
    with pytest.raises(PoolError, match=r"whole\.leads: 'base' is no model of another engine"):
        load([ENGINES[0], {**ENGINES[1], "leads": ["base"]}])
    with pytest.raises(PoolError, match=r"whole\.leads: the kind fake takes none; .* stacked"):
        load([ENGINES[0], {"name": "whole", "kind": "fake", "leads": ["chunk"]}])
