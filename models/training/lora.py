"""Low-rank adapters in training (LoRA, Hu et al. 2022): put on a model, trained alone, written as
PEFT writes them, and merged into the weights again.

Each matrix W of a layer becomes W + scale · B·A, where A is [rank, in] and B [out, rank]; W and all
else of the model stand still. A starts as PEFT starts it, B at zero, so that training starts from
the model itself.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from models.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Adapter, factor_names
from policies.files import replacing, write_atomic

_LAYERS: Final = "model.layers."


class LowRank(nn.Module):
    """What is added to one matrix."""

    def __init__(self, weight: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        num_outputs, num_inputs = weight.shape
        self.scale = scale
        self.shrink = nn.Parameter(torch.empty(rank, num_inputs))
        self.expand = nn.Parameter(torch.zeros(num_outputs, rank))
        nn.init.kaiming_uniform_(self.shrink, a=math.sqrt(5))

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        return self.shrink, self.expand

    def forward(self, weight: Tensor) -> Tensor:
        """Return the adapted matrix."""
        shrink, expand = self.factors
        return weight + self.scale * (expand @ shrink)


def add_adapter(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: float,
    seed: int,
    kind: Callable[[Tensor, int, float], LowRank] = LowRank,
) -> None:
    """Put a fresh adapter on every matrix of the layers of `model`, and let nothing else learn."""
    model.requires_grad_(requires_grad=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name.startswith(_LAYERS):
                added = kind(module.weight, rank, alpha / rank)
                parametrize.register_parametrization(module, "weight", added)


def low_rank_modules(model: PreTrainedModel) -> dict[str, LowRank]:
    """Return the adapter on `model`, by the names of the modules that it adapts."""
    return {
        name.removesuffix(".parametrizations.weight.0"): module
        for name, module in model.named_modules()
        if isinstance(module, LowRank)
    }


@torch.no_grad()
def save_adapter(model: PreTrainedModel, folder: Path, *, base: str) -> None:
    """Write the adapter on `model` as PEFT does; `base` is what it calls the model."""
    modules = low_rank_modules(model)
    tensors = {
        name: factor.contiguous()
        for module, adapter in modules.items()
        for name, factor in zip(factor_names(module), adapter.factors, strict=True)
    }
    any_of = next(iter(modules.values()))
    rank = len(any_of.shrink)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": any_of.scale * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / ADAPTER_WEIGHTS) as fresh:
        save_file(tensors, fresh)
    write_atomic(folder / ADAPTER_CONFIG, json.dumps(config, indent=2) + "\n")


@torch.no_grad()
def merge_adapter(model: PreTrainedModel, adapter: Adapter) -> None:
    """Add an adapter to the weights of its base, in place."""
    tensors = load_file(adapter.path / ADAPTER_WEIGHTS)
    for module, scale in adapter.scales.items():
        shrink, expand = (tensors[name].float() for name in factor_names(module))
        weight = model.get_submodule(module).get_parameter("weight")
        weight.add_((scale * expand @ shrink).to(weight.dtype))
