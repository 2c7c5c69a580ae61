"""Cuts a chunk out of a model: what of it a domain uses, and the best of that as a plain model.

How much each part matters is told by its activations on the domain's examples, with forward hooks
only. The scores follow Muralidharan et al. 2024 (Minitron): a channel's is the L2 norm over
examples of its mean absolute activation over tokens; a layer's is its Block Influence (Men et al.
2024), one minus the mean cosine between what enters and what leaves it.

Hidden channels are the same in all layers (the residual stream), heads are chosen within each
key/value group of each layer, feed-forward channels per layer; every layer keeps equally many, so
that the result loads like any checkpoint. What is kept stays in its order. An RMS norm over fewer
channels has another scale; its weight makes up for that, exactly if what was cut away was zero.

Shapes: `L` layers, `H` heads, `F` feed-forward channels, `D` hidden channels, `N` = 2L + 1 norms
(each layer's two, in order, and the last); `B` examples, `T` tokens, `C` channels. Padding counts
nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from models.downscale.shape import (
    CutShape,
    check_architecture,
    check_shape,
    cut_config,
    layers_of,
    shape_of,
)
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


Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class CutReport:
    """What a cut kept; indices into the base's layers, channels and heads."""

    shape: CutShape
    parameters: int
    base_parameters: int
    layers: tuple[int, ...]
    hidden: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    kv_heads: tuple[tuple[int, ...], ...]
    feed_forward: tuple[tuple[int, ...], ...]

    @property
    def pruned_share(self) -> float:
        """The share of the base's parameters that was cut away."""
        return 1 - self.parameters / self.base_parameters


def cut(
    model: PreTrainedModel, importance: Importance, shape: CutShape
) -> tuple[PreTrainedModel, CutReport]:
    """Return a new model of `shape` with the most important parts of `model`, and what they are.

    With the shape of `model` itself the result equals `model`.

    Raises:
        BaseError: the architecture or the shape is not possible.
    """
    config = model.config
    check_architecture(config)
    check_shape(config, shape)
    base = shape_of(config)
    layers = _best(importance.layers_L, shape.num_layers)
    hidden = _best(importance.hidden_D, shape.hidden_size)
    groups = [_best_heads(importance.heads_LH[i], base, shape) for i in layers]
    channels = [_best(importance.feed_forward_LF[i], shape.intermediate_size) for i in layers]
    scales = _norm_scales(importance.norm_energy_ND, hidden)

    source = model.state_dict()
    kept = _outside_layers(source, torch.from_numpy(hidden), scale=float(scales[-1]))
    for new, old in enumerate(layers):
        kept |= _layer(
            source,
            (int(old), new),
            hidden=torch.from_numpy(hidden),
            heads=_rows(groups[new][0], base.head_dim),
            kv_heads=_rows(groups[new][1], base.head_dim),
            channels=torch.from_numpy(channels[new]),
            scales=(float(scales[2 * old]), float(scales[2 * old + 1])),
        )
    eps_scale = base.hidden_size / shape.hidden_size
    chunk = _build(cut_config(config, shape, eps_scale=eps_scale), kept, model)
    report = CutReport(
        shape=shape,
        parameters=chunk.num_parameters(),
        base_parameters=model.num_parameters(),
        layers=_ints(layers),
        hidden=_ints(hidden),
        heads=tuple(_ints(heads) for heads, _ in groups),
        kv_heads=tuple(_ints(kv_heads) for _, kv_heads in groups),
        feed_forward=tuple(_ints(one) for one in channels),
    )
    return chunk, report


def _ints(indices: Indices) -> tuple[int, ...]:
    return tuple(int(i) for i in indices)


def _best(scores: Array, count: int) -> Indices:
    """The indices of the `count` largest scores, in ascending order; the first of equals."""
    order = np.argsort(-scores, kind="stable")[:count]
    return np.sort(order).astype(np.int64)


def _best_heads(scores_H: Array, base: CutShape, shape: CutShape) -> tuple[Indices, Indices]:
    """Heads and key/value heads of one layer: the best groups, and the best heads of each."""
    per_group = shape.num_heads // shape.num_kv_heads
    scores_KG = scores_H.reshape(base.num_kv_heads, -1)
    within = [_best(group, per_group) for group in scores_KG]
    worth = np.array([group[i].sum() for group, i in zip(scores_KG, within, strict=True)])
    groups = _best(worth, shape.num_kv_heads)
    heads = np.concatenate([g * scores_KG.shape[1] + within[g] for g in groups])
    return heads.astype(np.int64), groups


def _rows(heads: Indices, head_dim: int) -> Tensor:
    """The rows of a projection that belong to `heads`."""
    return torch.from_numpy((heads[:, None] * head_dim + np.arange(head_dim)).reshape(-1))


def _norm_scales(energy_ND: Array, hidden: Indices) -> Array:
    """Per norm, root mean square of the kept channels over that of all of them."""
    kept, whole = energy_ND[:, hidden].mean(-1), energy_ND.mean(-1)
    known = (kept > 0) & (whole > 0)
    scales: Array = np.sqrt(np.where(known, kept, 1.0) / np.where(known, whole, 1.0))
    return scales


def _outside_layers(
    source: Mapping[str, Tensor], hidden: Tensor, *, scale: float
) -> dict[str, Tensor]:
    kept = {
        "model.embed_tokens.weight": source["model.embed_tokens.weight"][:, hidden],
        "model.norm.weight": source["model.norm.weight"][hidden] * scale,
    }
    if "lm_head.weight" in source:
        kept["lm_head.weight"] = source["lm_head.weight"][:, hidden]
    return kept


def _layer(
    source: Mapping[str, Tensor],
    index: tuple[int, int],
    *,
    hidden: Tensor,
    heads: Tensor,
    kv_heads: Tensor,
    channels: Tensor,
    scales: tuple[float, float],
) -> dict[str, Tensor]:
    """The tensors of layer `index` (in the base, in the chunk), by their names in the chunk."""
    outputs = {
        "self_attn.q_proj": heads,
        "self_attn.k_proj": kv_heads,
        "self_attn.v_proj": kv_heads,
        "self_attn.o_proj": hidden,
        "mlp.gate_proj": channels,
        "mlp.up_proj": channels,
        "mlp.down_proj": hidden,
    }
    inputs = {"self_attn.o_proj": heads, "mlp.down_proj": channels}
    old, new = (f"model.layers.{i}." for i in index)
    kept: dict[str, Tensor] = {}
    for name, rows in outputs.items():
        columns = inputs.get(name, hidden)
        kept[f"{new}{name}.weight"] = source[f"{old}{name}.weight"][rows][:, columns]
        if (bias := source.get(f"{old}{name}.bias")) is not None:
            kept[f"{new}{name}.bias"] = bias[rows]
    for name, scale in zip(("input_layernorm", "post_attention_layernorm"), scales, strict=True):
        kept[f"{new}{name}.weight"] = source[f"{old}{name}.weight"][hidden] * scale
    for name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
        if old + name in source:
            kept[new + name] = source[old + name]
    return kept


def _build(
    config: PretrainedConfig, tensors: Mapping[str, Tensor], model: PreTrainedModel
) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):  # the fresh weights are overwritten
        chunk = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=model.dtype
        )
    chunk.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()})
    chunk.generation_config = model.generation_config
    built: PreTrainedModel = chunk.to(model.device).eval()
    return built
