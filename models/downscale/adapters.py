"""Adapters in place of cuts: one per domain on the whole base, by the same stages.

A member then starts from the base with a fresh low-rank adapter, which alone is trained, and is
kept as PEFT's folder; it is measured and served on the base that the pool ships. What is left out
is what a cut needs: importance, shapes, and the law of pruning.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

from transformers import PreTrainedModel

from models.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from models.downscale.base import base_model
from models.downscale.recipe import AdaptSettings
from models.downscale.stage import Run
from models.training.lora import add_adapter, save_adapter


def has_adapters(run: Run) -> bool:
    """Whether the recipe's members are adapters of the base, not cuts."""
    return run.recipe.members.adapters is not None


def adapted_base(run: Run) -> PreTrainedModel:
    """The base with a fresh adapter, which alone learns."""
    settings = run.recipe.members.adapters
    assert settings is not None
    model = copy.deepcopy(base_model(run)[0])
    add_adapter(
        model,
        rank=settings.rank,
        alpha=2 * settings.rank if settings.alpha is None else settings.alpha,
        seed=run.recipe.seed,
    )
    return model


def training_of(run: Run, settings: AdaptSettings) -> AdaptSettings:
    """How an adapter is trained: as a cut would be, but by AdamW at a rate of its own."""
    adapters = run.recipe.members.adapters
    assert adapters is not None
    changes = {"optimizer": "adamw", "learning_rate": adapters.learning_rate}
    return settings.model_copy(update=changes)


def keep_adapter(run: Run, model: PreTrainedModel, folder: Path) -> None:
    """Write the adapter on `model` into `folder`."""
    save_adapter(model, folder, base=run.recipe.base.checkpoint or "base")


def copy_adapter(source: Path, folder: Path) -> None:
    """Copy an adapter's files."""
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copy(source / name, folder / name)
