"""Training state on disk: weights and optimizer moments as safetensors, the rest as JSON.

Written to a temporary folder that replaces the old one in one rename, so that an interrupted
write never leaves a half checkpoint behind.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

_TENSORS = "state.safetensors"
_FACTS = "state.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far a run is: steps done, tokens seen, time spent, recipe it followed.

    `cpu_s` is the process's CPU time, which another's load does not lengthen. `losses` are
    (step, label loss in nats, a running mean) in the order of the run.
    """

    step: int
    num_tokens: int
    wall_clock_s: float
    recipe: dict[str, Any]
    cpu_s: float = 0.0
    losses: tuple[tuple[int, float], ...] = ()


def save_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    optimizers: Sequence[torch.optim.Optimizer],
    progress: Progress,
) -> None:
    """Write `folder` atomically, replacing what stood there."""
    tensors: dict[str, Tensor] = {f"model/{n}": p.detach() for n, p in model.named_parameters()}
    for o, optimizer in enumerate(optimizers):
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{o}/{index}/{key}": value for key, value in state.items()}
    fresh, old = folder.with_suffix(".new"), folder.with_suffix(".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, fresh / _TENSORS)
    facts = {
        "step": progress.step,
        "num_tokens": progress.num_tokens,
        "wall_clock_s": progress.wall_clock_s,
        "cpu_s": progress.cpu_s,
        "recipe": progress.recipe,
        "losses": progress.losses,
    }
    (fresh / _FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_progress(folder: Path) -> Progress | None:
    """The progress stored in `folder`, or None where there is no checkpoint."""
    path = folder / _FACTS
    if not path.exists():
        return None
    facts = json.loads(path.read_text())
    losses = tuple((int(step), float(loss)) for step, loss in facts.pop("losses", ()))
    return Progress(**facts, losses=losses)


def load_checkpoint(
    folder: Path, model: PreTrainedModel, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Restore weights and optimizer moments in place.

    Raises:
        KeyError: the checkpoint is of another model.
    """
    tensors = load_file(folder / _TENSORS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model/{name}"])
    for o, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, *rest = name.split("/")
            if kind == "optimizer" and rest[0] == str(o):
                state.setdefault(int(rest[1]), {})[rest[2]] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def load_weights(folder: Path, model: PreTrainedModel) -> None:
    """Restore the weights in place.

    Raises:
        KeyError: the checkpoint is of another model.
    """
    load_checkpoint(folder, model, ())
