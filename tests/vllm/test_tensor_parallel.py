"""The fused ensemble in two worker processes, each with half of the members."""

import random
from pathlib import Path

import pytest

from tests.vllm.fused_world import (
    Ask,
    Reference,
    generate,
    make_world,
    random_prompt,
    token_ids,
    vllm_engine,
)


@pytest.mark.slow
def test_members_split_over_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `tensor_parallel_size=2` four members give the reference's tokens (seed 1), whichever
    worker holds those that have weight."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    world, rng = make_world(tmp_path, "llama", 4), random.Random(1)
    asks = [
        Ask(prompt=random_prompt(rng, 5)),
        Ask(prompt=random_prompt(rng, 80), weights=[1.0, 0.0, 2.0, 3.0]),
        Ask(prompt=random_prompt(rng, 20), weights=[0.0, 0.0, 1.0, 0.0]),
        Ask(prompt=random_prompt(rng, 9), weights=[1.0, 0.0, 0.0, 1.0], rule="product"),
    ]
    with vllm_engine(world.folder, tensor_parallel_size=2) as llm:
        answers = token_ids(generate(llm, asks))
    reference = Reference(world)
    assert answers == [reference.answer(ask) for ask in asks]
