"""The training loop: it learns, and it resumes exactly."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from models.downscale.base import TaskTraining, batches, train_on_tasks
from models.training.checkpoint import read_progress
from models.training.data import Rows
from models.training.scratch import build_model, grow
from models.training.settings import BaseShape

_TINY = BaseShape(hidden_size=32, intermediate_size=64, num_heads=4, num_kv_heads=2, head_dim=8)
_RECIPE = TaskTraining(
    mixture={"arithmetic": 1.0},
    num_steps=12,
    num_decay_steps=4,
    num_warmup_steps=2,
    rows_per_step=2,
    row_tokens=64,
    compiled=False,
)


def _run(
    tokenizer: PreTrainedTokenizerFast, folder: Path, recipe: TaskTraining, **options: object
) -> LlamaForCausalLM:
    model = build_model(_TINY, 2, tokenizer, seed=0)
    train_on_tasks(model, tokenizer, recipe, folder=folder, report=_ignore, **options)  # type: ignore[arg-type]
    return model


def _ignore(_: str) -> None:
    """Report to nobody."""


def _same_weights(one: LlamaForCausalLM, other: LlamaForCausalLM) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_loss_falls(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Fifty small steps bring the loss well below that of a uniform guess (6.2 nats)."""
    lines: list[str] = []
    model = build_model(_TINY, 2, tokenizer, seed=0)
    recipe = replace(_RECIPE, num_steps=50)
    train_on_tasks(model, tokenizer, recipe, folder=tmp_path, report=lines.append)
    assert len(lines) == 1
    assert "tokens/s" in lines[0]
    assert float(lines[0].split("loss ")[1].split()[0]) < 5.0


def _run_for_six_steps(
    tokenizer: PreTrainedTokenizerFast, folder: Path, recipe: TaskTraining
) -> None:
    """Run as a run is ended from outside: in its seventh step."""

    def broken(*args: Any, **kwargs: Any) -> Iterator[Rows]:
        yield from islice(batches(*args, **kwargs), 6)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("models.downscale.base.batches", broken)
        _run(tokenizer, folder, recipe, checkpoint_every_s=0.0)
    stopped = read_progress(folder / "last")
    assert stopped is not None
    assert stopped.step == 6


@pytest.mark.parametrize("muon", [True, False])
def test_a_resumed_run_gives_the_same_weights(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, muon: bool
) -> None:
    """Broken off and resumed, a run ends with the weights of an unbroken one."""
    recipe = replace(_RECIPE, muon=muon)
    whole = _run(tokenizer, tmp_path / "whole", recipe)
    _run_for_six_steps(tokenizer, tmp_path / "broken", recipe)
    resumed = _run(tokenizer, tmp_path / "broken", recipe, resume=True)
    assert _same_weights(whole, resumed)


@pytest.mark.parametrize(
    "change", [{"num_steps": 20, "num_decay_steps": 6}, {"learning_rate": 1e-3}]
)
def test_a_finished_run_becomes_what_is_wanted(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, change: dict[str, Any]
) -> None:
    """A longer run resumes before the decay of a shorter one, and of another recipe nothing is
    resumed: both end as if run at once.
    """
    other = replace(_RECIPE, **change)
    _run(tokenizer, tmp_path / "a", _RECIPE)
    resumed = _run(tokenizer, tmp_path / "a", other, resume=True)
    assert _same_weights(resumed, _run(tokenizer, tmp_path / "b", other))


def test_a_run_can_be_shortened_before_its_decay(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Stopped early, a run goes on to a nearer end as if that had been its plan."""
    _run_for_six_steps(tokenizer, tmp_path / "a", replace(_RECIPE, num_steps=30))
    shortened = _run(tokenizer, tmp_path / "a", _RECIPE, resume=True)
    assert _same_weights(shortened, _run(tokenizer, tmp_path / "b", _RECIPE))


def test_a_checkpoint_replaces_the_old_one_whole(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """After a run there are the two finished checkpoints and no leftovers of writing."""
    _run(tokenizer, tmp_path, _RECIPE, checkpoint_every_s=0.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "stable"]
    progress = read_progress(tmp_path / "last")
    assert progress is not None
    assert progress.step == _RECIPE.num_steps


def test_growing_keeps_the_function(tokenizer: PreTrainedTokenizerFast) -> None:
    """A model grown to twice its depth computes what it computed before."""
    shallow = build_model(_TINY, 2, tokenizer, seed=0)
    deep = build_model(_TINY, 4, tokenizer, seed=1)
    grow(shallow, deep)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.allclose(shallow(ids).logits, deep(ids).logits, atol=1e-6)
    with pytest.raises(ValueError, match="3 layers are no multiple of 2"):
        grow(shallow, build_model(_TINY, 3, tokenizer, seed=1))
