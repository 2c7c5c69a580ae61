"""Models on disk: the state of an unfinished training, and the plain checkpoint at its end.

State (weights and optimizer moments as safetensors, the rest as JSON) is written to a temporary
folder that replaces the old one in one rename, so that an interrupted write never leaves a half
checkpoint behind.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from policies.files import replacing_folder

_TENSORS = "state.safetensors"
_FACTS = "state.json"
_BESIDE = "beside/"


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
    *,
    beside: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Write `folder` atomically, replacing what stood there; `beside` are more tensors to keep."""
    tensors = {f"{_BESIDE}{name}": tensor for name, tensor in beside.items()}
    tensors |= {f"model/{n}": p.detach() for n, p in model.named_parameters() if p.requires_grad}
    for o, optimizer in enumerate(optimizers):
        tensors |= optimizer_tensors(optimizer, f"optimizer/{o}/")
    with replacing_folder(folder) as fresh:
        save_file({name: t.contiguous() for name, t in tensors.items()}, fresh / _TENSORS)
        (fresh / _FACTS).write_text(json.dumps(asdict(progress), indent=1) + "\n")


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
            if parameter.requires_grad:
                parameter.copy_(tensors[f"model/{name}"])
    for o, optimizer in enumerate(optimizers):
        load_optimizer(optimizer, tensors, f"optimizer/{o}/")


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """The moments of `optimizer`, by names that begin with `prefix`."""
    every = optimizer.state_dict()["state"].items()
    return {f"{prefix}{i}/{key}": value for i, state in every for key, value in state.items()}


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str
) -> None:
    """Restore what `optimizer_tensors` returned; `tensors` may hold others, too."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith(prefix):
            index, key = name.removeprefix(prefix).split("/")
            state.setdefault(int(index), {})[key] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def load_beside(folder: Path) -> dict[str, Tensor]:
    """The tensors that were kept beside a model's own, by their names."""
    tensors = load_file(folder / _TENSORS)
    return {n.removeprefix(_BESIDE): t for n, t in tensors.items() if n.startswith(_BESIDE)}


def export_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write config, weights (in the type they have), tokenizer and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    generation = model.generation_config
    if generation is not None and generation.eos_token_id is None:
        generation.eos_token_id = tokenizer.eos_token_id
        generation.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    # safetensors writes files that only their owner may read.
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)
    tokenizer.save_pretrained(folder)
    template = tokenizer.get_chat_template()
    (folder / "chat_template.jinja").write_text(template)
    _say_for_older_readers(folder)


def _say_for_older_readers(folder: Path) -> None:
    """Name the tokenizer's class and the rotary embedding as transformers 4 and 5 both know them.

    Version 5 has the rotary base in `rope_parameters` alone; older readers look for it at the top,
    and take 10,000 where it is not there.
    """
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    path.write_text(json.dumps(config, indent=2) + "\n")
