"""How much each part of a model matters to a domain, by its activations on the domain's examples.

Forward hooks only. The scores follow Muralidharan et al. 2024 (Minitron): a channel's is the L2
norm over examples of its mean absolute activation over tokens; a layer's is its Block Influence
(Men et al. 2024), one minus the mean cosine between what enters and what leaves it.

Shapes: `L` layers, `H` heads, `F` feed-forward channels, `D` hidden channels, `N` = 2L + 1 norms
(each layer's two, in order, and the last); `B` examples, `T` tokens, `C` channels. Padding counts
nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.downscale.cut.architecture import layers_of, shape_of
from models.training.data import Conversation
from policies.files import replacing

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Scores, larger means more important; compare only within one array's last axis.

    `norm_energy_ND` is the mean square of each hidden channel where it enters each norm, by which
    a cut keeps the norms' scale; ones where it isn't known.
    """

    layers_L: Array
    heads_LH: Array
    feed_forward_LF: Array
    hidden_D: Array
    norm_energy_ND: Array


def save_importance(importance: Importance, file: Path) -> None:
    """Write an .npz, atomically."""
    arrays = {field.name: getattr(importance, field.name) for field in fields(importance)}
    with replacing(file) as fresh:
        np.savez(fresh, **arrays)


def load_importance(file: Path) -> Importance:
    """Read what `save_importance` wrote."""
    with np.load(file, allow_pickle=False) as arrays:
        return Importance(**{name: arrays[name] for name in arrays.files})


_BATCH_EXAMPLES: Final = 64


@torch.inference_mode()
def activation_importance(
    model: PreTrainedModel, conversations: Sequence[Conversation]
) -> Importance:
    """Score the parts of `model` by its activations on `conversations`."""
    shape = shape_of(model.config)
    watch = _Watch(model)
    # Examples of like length share a batch, so that little of it is padding.
    ordered = sorted(conversations, key=lambda conversation: len(conversation.tokens))
    with watch.hooks():
        for start in range(0, len(ordered), _BATCH_EXAMPLES):
            tokens_BT, mask_BT = pad(ordered[start : start + _BATCH_EXAMPLES])
            watch.mask_BT = mask_BT.to(model.device)
            model(
                input_ids=tokens_BT.to(model.device),
                attention_mask=watch.mask_BT.long(),
                use_cache=False,
            )
    layers = range(shape.num_layers)
    by_channel = np.stack([watch.squares[f"o{i}"] for i in layers])
    by_head = by_channel.reshape(shape.num_layers, shape.num_heads, shape.head_dim)
    norms = [watch.squares[f"norm{n}"] for n in range(2 * shape.num_layers + 1)]
    return Importance(
        layers_L=np.array([1 - watch.cosine[i] / watch.num_tokens for i in layers]),
        heads_LH=np.sqrt(by_head.sum(-1)),
        feed_forward_LF=np.sqrt(np.stack([watch.squares[f"down{i}"] for i in layers])),
        hidden_D=np.sum([np.sqrt(norm) for norm in norms], axis=0),
        norm_energy_ND=np.stack(
            [watch.energy[n] / watch.num_tokens for n in range(2 * shape.num_layers + 1)]
        ),
    )


def pad(conversations: Sequence[Conversation]) -> tuple[Tensor, Tensor]:
    """Token ids `[B, T]`, padded with 0 on the right, and the mask of what is no padding."""
    longest = max(len(conversation.tokens) for conversation in conversations)
    tokens_BT = torch.zeros(len(conversations), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(conversations), longest, dtype=torch.bool)
    for row, conversation in enumerate(conversations):
        tokens_BT[row, : len(conversation.tokens)] = torch.tensor(conversation.tokens)
        mask_BT[row, : len(conversation.tokens)] = True
    return tokens_BT, mask_BT


class _Watch:
    """Sums over all examples of what the hooks see."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.mask_BT = torch.empty(0)
        self.squares: dict[str, Array] = {}
        self.energy: dict[int, Array] = {}
        self.cosine: dict[int, float] = {}
        self.num_tokens = 0

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = []
        last = 0
        for i, layer in enumerate(layers_of(self._model)):
            o_proj, down = layer.get_submodule("self_attn.o_proj"), layer.get_submodule("mlp")
            handles += [
                o_proj.register_forward_pre_hook(self._input(f"o{i}")),
                down.get_submodule("down_proj").register_forward_pre_hook(self._input(f"down{i}")),
                layer.register_forward_hook(self._layer(i), with_kwargs=True),
            ]
            for name in ("input_layernorm", "post_attention_layernorm"):
                handles.append(layer.get_submodule(name).register_forward_hook(self._norm(last)))
                last += 1
        final = self._model.get_submodule("model.norm")
        handles.append(final.register_forward_hook(self._norm(last)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _input(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self._add(name, arguments[0])

        return hook

    def _norm(self, index: int) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            self._add(f"norm{index}", output)
            x_KC = arguments[0][self.mask_BT].double()
            total = x_KC.square().sum(0).cpu().numpy()
            self.energy[index] = self.energy.get(index, 0) + total
            if index == 0:
                self.num_tokens += len(x_KC)

        return hook

    def _layer(self, index: int) -> Callable[..., None]:
        def hook(
            _: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Any], output: Tensor
        ) -> None:
            before = arguments[0] if arguments else keywords["hidden_states"]
            cosine_BT = torch.cosine_similarity(before.float(), output.float(), dim=-1)
            total = cosine_BT[self.mask_BT].double().sum().item()
            self.cosine[index] = self.cosine.get(index, 0.0) + total

        return hook

    def _add(self, name: str, x_BTC: Tensor) -> None:
        """Add the examples' squared mean absolute activations."""
        mask_BT1 = self.mask_BT[..., None]
        mean_BC = (x_BTC.float().abs() * mask_BT1).sum(1) / mask_BT1.sum(1)
        total = mean_BC.double().square().sum(0).cpu().numpy()
        self.squares[name] = self.squares.get(name, 0) + total
