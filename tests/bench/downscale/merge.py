"""Merging the chunks back into one model: what the ensemble is compared with.

Chunks keep different channels, so they are merged where they came from: what a chunk learnt since
the cut (its task vector) is put back at its places in the base, and the base moves by the merged
task vectors. "average" takes their mean over the chunks that have a weight; "ties" trims each to
its largest entries, elects a sign per weight by the total, and takes the mean of those that agree
(Yadav et al. 2023, "TIES-Merging").
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

Method = Literal["average", "ties"]
_KEPT_SHARE: Final = 0.2


@dataclass(frozen=True, kw_only=True)
class Descendant:
    """A chunk after and before its training, and the cut's report of what it kept."""

    adapted: PreTrainedModel
    cut: PreTrainedModel
    kept: Mapping[str, Any]


@torch.no_grad()
def merge(
    base: PreTrainedModel, chunks: Sequence[Descendant], *, method: Method, scale: float = 1.0
) -> PreTrainedModel:
    """A copy of `base`, moved by `scale` times the merged task vectors of `chunks`."""
    merged = copy.deepcopy(base)
    parameters = dict(merged.named_parameters())
    moves: dict[str, list[Tensor]] = {}
    held: dict[str, list[Tensor]] = {}
    for chunk in chunks:
        for name, vector, has in _task_vectors(chunk, parameters):
            moves.setdefault(name, []).append(vector)
            held.setdefault(name, []).append(has)
    for name, vectors in moves.items():
        stacked, has = torch.stack(vectors), torch.stack(held[name])
        move = _average(stacked, has) if method == "average" else _ties(stacked)
        parameters[name].add_(scale * move)
    return merged


def _average(vectors: Tensor, held: Tensor) -> Tensor:
    return vectors.sum(0) / held.sum(0).clamp(min=1)


def _ties(vectors: Tensor) -> Tensor:
    trimmed = torch.stack([_trim(vector) for vector in vectors])
    sign = trimmed.sum(0).sign()
    agree = (trimmed.sign() == sign) & (trimmed != 0)
    return (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)


def _trim(vector: Tensor) -> Tensor:
    """Only the largest entries of those that are there, by magnitude."""
    sizes = vector.abs()
    there = sizes[sizes > 0]
    if not len(there):
        return vector
    count = max(1, round(_KEPT_SHARE * len(there)))
    return torch.where(sizes >= there.topk(count).values[-1], vector, 0.0)


def _task_vectors(
    chunk: Descendant, base: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """By the base's names: what the chunk learnt, zero where it has nothing, and where it has."""
    before = dict(chunk.cut.named_parameters())
    head_dim = int(chunk.kept["shape"]["head_dim"])
    for name, after in chunk.adapted.named_parameters():
        origin, axes = _places(name, chunk.kept, head_dim)
        vector, has = torch.zeros_like(base[origin]), torch.zeros_like(base[origin])
        index = [torch.arange(size) if axis is None else torch.tensor(axis)
                 for axis, size in zip(axes, after.shape, strict=True)]  # fmt: skip
        grid = torch.meshgrid(*index, indexing="ij")
        vector[grid] = after - before[name]
        has[grid] = 1
        yield origin, vector, has


def _places(
    name: str, kept: Mapping[str, Any], head_dim: int
) -> tuple[str, list[list[int] | None]]:
    """Where a chunk's parameter stood in the base: its name, and its indices along each axis."""
    hidden: list[int] = list(kept["hidden"])
    if not name.startswith("model.layers."):
        return name, [hidden] if "norm" in name else [None, hidden]
    _, _, number, rest = name.split(".", 3)
    layer = int(number)
    heads = _rows(kept["heads"][layer], head_dim)
    kv_heads = _rows(kept["kv_heads"][layer], head_dim)
    channels = list(kept["feed_forward"][layer])
    axes: dict[str, list[list[int] | None]] = {
        "q_proj": [heads, hidden],
        "k_proj": [kv_heads, hidden],
        "v_proj": [kv_heads, hidden],
        "o_proj": [hidden, heads],
        "gate_proj": [channels, hidden],
        "up_proj": [channels, hidden],
        "down_proj": [hidden, channels],
        "q_norm": [None],
        "k_norm": [None],
        "input_layernorm": [hidden],
        "post_attention_layernorm": [hidden],
    }
    *_, part, kind = rest.split(".")
    places = axes[part][:1] if kind == "bias" else axes[part]
    return f"model.layers.{kept['layers'][layer]}.{rest}", places


def _rows(heads: Sequence[int], head_dim: int) -> list[int]:
    return [head * head_dim + i for head in heads for i in range(head_dim)]
