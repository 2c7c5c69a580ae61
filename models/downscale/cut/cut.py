"""Cuts a chunk out of a model: the most important layers, heads and channels, as a plain model.

Hidden channels are the same in all layers (the residual stream), heads are chosen within each
key/value group of each layer, feed-forward channels per layer; every layer keeps equally many, so
that the result loads like any checkpoint. What is kept stays in its order. An RMS norm over fewer
channels has another scale; its weight makes up for that, exactly if what was cut away was zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from models.downscale.cut.architecture import (
    CutShape,
    check_architecture,
    check_shape,
    cut_config,
    num_parameters,
    shape_of,
)
from models.downscale.cut.importance import Array, Importance

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
        parameters=num_parameters(chunk),
        base_parameters=num_parameters(model),
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
