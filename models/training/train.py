"""Training on generated tasks: a mixture of domains in, a trained checkpoint out."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from models.training.checkpoint import Progress
from models.training.data import Renderer, steps
from models.training.loop import Settings, run


@dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """Everything that the trained weights depend on, beside the model's own shape and seed.

    `mixture` gives each domain's share of the conversations.
    """

    mixture: Mapping[str, float]
    question_weight: float = 0.2
    seed: int = 0


def train(
    model: PreTrainedModel,
    renderer: Renderer,
    recipe: Recipe,
    *,
    folder: Path,
    resume: bool = False,
    deadline_s: float | None = None,
    checkpoint_every_s: float = 60.0,
    report: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """Train `model` in place on fresh tasks; see `models.training.loop.run`."""
    return run(
        model,
        lambda first_step: steps(
            renderer,
            recipe.mixture,
            seed=recipe.seed,
            first_step=first_step,
            rows_per_step=recipe.rows_per_step,
            row_tokens=recipe.row_tokens,
            question_weight=recipe.question_weight,
        ),
        recipe,
        asdict(replace(recipe, mixture=dict(recipe.mixture))),
        folder=folder,
        resume=resume,
        deadline_s=deadline_s,
        checkpoint_every_s=checkpoint_every_s,
        report=report,
        clock=clock,
    )
