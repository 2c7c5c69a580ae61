"""Conversations find the replica that has their earlier turns, on a real Ray."""

import random
import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from models.spec import DeploymentSpec
from router.placement import affinity
from tests.models.engines.stacked.tiny import save_checkpoint
from tests.router.conftest import write_pool
from tests.server import started


def test_places_are_those_of_the_longest_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole blocks of tokens count; what was remembered last wins; the oldest is forgotten."""
    with warnings.catch_warnings(action="ignore"):  # Ray's own, as it is imported
        from router.affinity import Places

    monkeypatch.setattr("router.affinity._MOST_BLOCKS", 6)
    places = Places[str]()
    places.remember(range(100), "a")
    places.remember([*range(64), *range(900, 960)], "b")
    assert places.find([]) is None
    assert places.find(range(31)) is None
    assert places.find(range(64)) == "b"
    assert places.find(range(130)) == "a"
    assert places.find(range(1, 130)) is None
    places.remember(range(5000, 5000 + 6 * 32), "c")
    assert places.find(range(130)) is None


def test_one_replica_needs_no_choice() -> None:
    """Ray Serve keeps its own rule where there is nothing to choose from."""
    assert affinity(DeploymentSpec()) == {}
    assert affinity(DeploymentSpec(min_replicas=2)) == affinity(DeploymentSpec(max_replicas=3))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`shoal serve` with two replicas of an engine of one tiny random model."""
    folder = tmp_path_factory.mktemp("affinity")
    save_checkpoint(folder / "tiny")
    engine = {"name": "e", "kind": "stacked", "deployment": {"min_replicas": 2, "max_replicas": 2}}
    write_pool(
        folder,
        policies={},
        engines=[engine],
        models=[{"name": "tiny", "engine": "e", "checkpoint": "tiny"}],
    )
    with started(folder, "--pool", ".") as server:
        yield server.url


def _ask(http: httpx.Client, prompt: list[int], **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0, **fields}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["usage"]
    return found


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_later_turns_go_where_the_earlier_ones_went(url: str) -> None:
    """Twelve conversations side by side of four turns each: every later turn finds its earlier
    ones' tokens; eight choices of one request all come back.
    """
    rng = random.Random(0)
    said = [[rng.randrange(2, 320) for _ in range(40)] for _ in range(12)]
    with httpx.Client(base_url=url, timeout=120) as http:
        for turn in range(4):
            for prompt in said:
                cached = _ask(http, prompt)["prompt_tokens_details"]["cached_tokens"]
                assert (cached >= len(prompt) - 20) if turn else (cached == 0)
                prompt += [rng.randrange(2, 320) for _ in range(20)]
        usage = _ask(http, said[0], n=8)
        assert usage["completion_tokens"] == 32
