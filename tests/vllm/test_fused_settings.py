"""What a fused folder sets by itself where vLLM runs on CPU."""

from pathlib import Path

import pytest
import torch

from tests.vllm.fused_world import Ask, Reference, generate, make_world, token_ids, vllm_engine

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for a CPU only")


@pytest.mark.parametrize(("asked", "used"), [(None, 32), (64, 64)], ids=["default", "asked"])
def test_blocks(tmp_path: Path, asked: int | None, used: int) -> None:
    """Blocks are small unless others are asked for, and answers are the same."""
    world = make_world(tmp_path, "llama", 2)
    asks = [Ask(prompt=list(range(2, 60))), Ask(prompt=[5, 6], weights=[1, 3])]
    with vllm_engine(world.folder, **({} if asked is None else {"block_size": asked})) as llm:
        assert llm.llm_engine.vllm_config.cache_config.block_size == used
        answers = token_ids(generate(llm, asks))
        # With denormal numbers vLLM's attention would take four times as long.
        assert (torch.tensor([1e-30]) * 1e-10).item() == 0
    reference = Reference(world)
    assert answers == [reference.answer(ask) for ask in asks]
