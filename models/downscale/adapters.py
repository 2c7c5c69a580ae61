"""Adapters in place of cuts: one per domain on the whole base, by the same stages.

A member then starts from the base with a fresh low-rank adapter, which alone is trained, and is
kept as PEFT's folder; it is measured and served on the base that the pool ships. What is left out
is what a cut needs: importance, shapes, and the law of pruning.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from models.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from models.downscale.recipe import AdapterSettings, AdaptSettings
from models.downscale.stage import Run
from models.downscale.vocabulary import base_model
from models.training.loop import Method
from models.training.lora import LowRank, add_adapter, save_adapter
from models.training.monte_carlo import MonteCarlo, Posterior, Unmasking, drawn
from models.training.settings import MonteCarloSettings, UnmaskSettings


def has_adapters(run: Run) -> bool:
    """Whether the recipe's members are adapters of the base, not cuts."""
    return run.recipe.members.adapters is not None


def adapted_base(run: Run) -> PreTrainedModel:
    """The base with a fresh adapter, which alone learns."""
    settings = run.recipe.members.adapters
    assert settings is not None
    model = copy.deepcopy(base_model(run)[0])
    prior = _prior(settings)
    add_adapter(
        model,
        rank=settings.rank,
        alpha=2 * settings.rank if settings.alpha is None else settings.alpha,
        seed=run.recipe.seed,
        kind=LowRank if prior is None else partial(Posterior, prior=prior),
    )
    return model


def training_of(run: Run, settings: AdaptSettings) -> AdaptSettings:
    """How an adapter is trained: as a cut would be, but by AdamW at a rate of its own."""
    adapters = run.recipe.members.adapters
    assert adapters is not None
    changes = {"optimizer": "adamw", "learning_rate": adapters.learning_rate}
    if adapters.unmask is not None:
        changes["weight_decay"] = 0.0  # would move what does not learn
    return settings.model_copy(update=changes)


def method_of(run: Run) -> Callable[[int], Method]:
    """What takes part in the steps of a member's training, by their number."""
    adapters = run.recipe.members.adapters
    if adapters is None or (adapters.unmask is None and adapters.monte_carlo is None):
        return lambda _: Method()
    if adapters.unmask is not None:
        unmask = UnmaskSettings(**adapters.unmask.model_dump())
        return lambda num_steps: Unmasking(unmask, num_steps=num_steps)
    prior = _prior(adapters)
    assert prior is not None
    method = MonteCarlo(prior, seed=run.recipe.seed)
    return lambda _: method


def _prior(adapters: AdapterSettings) -> MonteCarloSettings | None:
    chosen = adapters.monte_carlo
    return None if chosen is None else MonteCarloSettings(**chosen.model_dump())


def keep_adapter(run: Run, model: PreTrainedModel, folder: Path, domain: str) -> None:
    """Write the adapter on `model` into `folder`, and its draws into folders by their names."""
    base = run.recipe.base.checkpoint or "base"
    save_adapter(model, folder, base=base)
    draws = [name for name, of in run.recipe.sampled_members.items() if of == domain]
    for number, name in enumerate(draws, start=1):
        # Other numbers than the steps of a training ever have.
        with drawn(model, seed=run.recipe.seed, draw=-number):
            save_adapter(model, folder / name, base=base)


def copy_adapter(source: Path, folder: Path) -> None:
    """Copy an adapter's files."""
    folder.mkdir(exist_ok=True)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copy(source / name, folder / name)
