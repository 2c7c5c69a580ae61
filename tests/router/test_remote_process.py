"""Another `shoal serve`, a process of its own, as a member of our pool."""

from collections.abc import Iterator
from typing import Any

import pytest

from models.pool import DEFAULT_POOL, load_pool
from tests.router.conftest import Running, running
from tests.server import started

pytestmark = pytest.mark.slow

ONE, OTHER = [model.name for model in load_pool(DEFAULT_POOL).models[:2]]
QUESTION = "Write the word 'lantern' backwards."


@pytest.fixture(scope="module", name="url")
def upstream_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the shipped pool, served with `shoal serve --local`."""
    with started(tmp_path_factory.mktemp("upstream"), "--local") as server:
        yield f"{server.url}/v1"


@pytest.fixture(scope="module", name="front")
def front_server(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server whose own model is a shipped chunk; two more are the other server's."""
    folder = str(DEFAULT_POOL / ONE)
    remote: dict[str, Any] = {"tokenizer": folder, "context_tokens": 512}
    with running(
        tmp_path_factory.mktemp("front"),
        engines=[
            {"name": "near", "kind": "stacked", "device": "cpu"},
            {"name": "far", "kind": "remote", "options": {"base_url": url}},
        ],
        models=[
            {"name": "near-one", "engine": "near", "checkpoint": folder},
            {"name": "far-one", "engine": "far", "remote": {**remote, "model": ONE}},
            {"name": "far-other", "engine": "far", "remote": {**remote, "model": OTHER}},
        ],
        policies={},
    ) as server:
        yield server


def test_the_same_model_says_the_same_there(front: Running) -> None:
    """Greedy text, log-probabilities and usage of a remote model are those of its checkpoint."""
    near, far = (
        front.chat(QUESTION, name, temperature=0, logprobs=True, top_logprobs=3)
        for name in ("near-one", "far-one")
    )
    assert near.choices[0].message.content == far.choices[0].message.content
    items = [answer.choices[0].logprobs.content for answer in (near, far)]
    assert [item.token for item in items[0]] == [item.token for item in items[1]]
    assert [i.logprob for i in items[0]] == pytest.approx([i.logprob for i in items[1]], abs=1e-3)
    assert near.usage == far.usage
    assert near.shoal["tokens"]["near-one"] == far.shoal["tokens"]["far-one"]


def test_fuses_across_servers(front: Running) -> None:
    """With a known tokenizer a remote model takes part in fusion, at the boundaries of strings."""
    plan = {"answer": {"members": ["near-one", "far-other"], "weights": [1, 0]}}
    fused = front.chat(QUESTION, "auto", temperature=0, extra_body={"shoal": {"plan": plan}})
    alone = front.chat(QUESTION, "near-one", temperature=0)
    assert fused.choices[0].message.content == alone.choices[0].message.content
    assert set(fused.shoal["tokens"]) == {"near-one", "far-other"}
