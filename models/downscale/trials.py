"""Short runs whose held-out losses are written down as they go: what the laws are fitted on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from transformers import PreTrainedModel

from models.downscale.adapt import adapt
from models.downscale.recipe import AdaptSettings
from models.training.checkpoint import Progress
from models.training.data import Conversation

# Enough for a mean loss to about 1%; trials judge often.
NUM_JUDGED: Final = 400


def trial_facts(settings: AdaptSettings) -> dict[str, Any]:
    """What of the settings a trial depends on, as JSON."""
    return settings.model_dump(exclude={"tokens", "general_share", "decay_share", "distill"})


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Held-out losses, by name, in nats per answer token, after so many training tokens."""

    tokens: int
    losses: dict[str, float]


def trial(
    model: PreTrainedModel,
    own: Sequence[Conversation],
    general: Sequence[Conversation],
    judges: Mapping[str, Callable[[PreTrainedModel], float]],
    *,
    general_share: float,
    after_tokens: Sequence[int],
    settings: AdaptSettings,
    seed: int,
    distill: bool = True,
) -> list[Judgement]:
    """Train `model` and judge it after each number of tokens, the learning rate held constant.

    With the decay of a full run, each number of tokens would need a run of its own; without it one
    run gives them all, a little above what a decayed run would reach.
    """
    steady = settings.model_copy(update={"decay_share": 0.0})
    waiting = sorted(after_tokens)
    found: list[Judgement] = []

    def watch(progress: Progress) -> None:
        if waiting and progress.num_tokens >= waiting[0]:
            del waiting[0]
            losses = {name: judge(model) for name, judge in judges.items()}
            found.append(Judgement(tokens=progress.num_tokens, losses=losses))

    adapt(
        model,
        own,
        general,
        general_share=general_share,
        # Rows are not quite full, and the last judgement must be reached.
        tokens=int(1.1 * max(after_tokens)) + settings.rows_per_step * settings.row_tokens,
        settings=steady,
        seed=seed,
        distill=distill,
        watch=watch,
    )
    return found
