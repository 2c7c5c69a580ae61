"""Weights of M same-shaped checkpoints, stacked into tensors with a leading member axis.

Shapes: M members, D hidden, H query heads, K key/value heads, d head size, F feed-forward, V
vocabulary. Projections are stored `[M, in, out]`, which is the fastest operand order of a batched
product on CPU (measured: 1.1 to 3 times faster than `[M, out, in]`).

Three changes against the checkpoint, none of which changes the function computed:

- query, key and value are one matrix, and so are gate and up;
- the gain of a norm is multiplied into the projection that follows it;
- if wanted, dimension i stands next to dimension i + d/2 within each query and key head, so that a
  rotary pair is one complex number (scores do not depend on the order inside a head).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch import Tensor

from models.card import ModelCard
from models.engines.stacked.architecture import EMBEDDING, HEAD, Architecture
from models.errors import PoolError
from models.sources.safetensors import weight_files

_ReadMember = Callable[[int], Tensor]


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One layer of all members; None where the architecture has no such weight."""

    qkv_MDQ: Tensor  # Q = (H + 2K)·d
    qkv_bias_MQ: Tensor | None
    qk_gain_MHd: Tensor | None  # query heads, then key heads
    out_MQD: Tensor
    out_bias_MD: Tensor | None
    gate_up_MDF: Tensor  # gate, then up: 2F columns
    gate_up_bias_MF: Tensor | None
    down_MFD: Tensor
    down_bias_MD: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """All members. With tied embeddings `embed_MVD` is a transposed view of `head_MDV`."""

    embed_MVD: Tensor
    layers: tuple[LayerWeights, ...]
    final_gain_MD: Tensor
    head_MDV: Tensor


class _Checkpoints:
    """Reads one named tensor of every member at a time."""

    def __init__(self, cards: Sequence[ModelCard], stack: ExitStack) -> None:
        self._cards = cards
        self._files = [
            {
                name: file
                for path in weight_files(card.path)
                for file in [stack.enter_context(safe_open(path, framework="pt"))]
                for name in file.keys()  # noqa: SIM118 - not a mapping
            }
            for card in cards
        ]

    def has(self, member: int, name: str) -> bool:
        return name in self._files[member]

    def read(self, member: int, name: str) -> Tensor:
        file = self._files[member].get(name)
        if file is None:
            raise PoolError(f"{self._cards[member].path}: the weight {name!r} is missing")
        tensor: Tensor = file.get_tensor(name).float()
        return tensor


def load_weights(
    cards: Sequence[ModelCard],
    architecture: Architecture,
    device: torch.device,
    dtype: torch.dtype,
    *,
    rotary_pairs: bool = True,
) -> Weights:
    """Stack the checkpoints' weights on `device`; `PoolError` names one that is missing.

    `rotary_pairs` puts the two dimensions of each rotary pair side by side; without it they stand
    half a head apart, as in the checkpoint.
    """
    with ExitStack() as stack:
        return _Loader(
            _Checkpoints(cards, stack),
            len(cards),
            architecture,
            device=device,
            dtype=dtype,
            rotary_pairs=rotary_pairs,
        ).load()


class _Loader:
    def __init__(
        self,
        checkpoints: _Checkpoints,
        num_members: int,
        architecture: Architecture,
        *,
        device: torch.device,
        dtype: torch.dtype,
        rotary_pairs: bool,
    ) -> None:
        self._checkpoints = checkpoints
        self._num_members = num_members
        self._architecture = architecture
        self._device = device
        self._dtype = dtype
        self._rotary_pairs = rotary_pairs

    def load(self) -> Weights:
        head_MDV = self._stack(lambda m: self._read_either(m, HEAD, EMBEDDING).T)
        if all(self._is_tied(member) for member in range(self._num_members)):
            embed_MVD = head_MDV.transpose(1, 2)
        else:
            embed_MVD = self._stack(lambda m: self._read_either(m, EMBEDDING, HEAD))
        return Weights(
            embed_MVD=embed_MVD,
            layers=tuple(self._layer(i) for i in range(self._architecture.shape.num_layers)),
            final_gain_MD=self._stack(lambda m: self._read(m, "model.norm.weight")),
            head_MDV=head_MDV,
        )

    def _layer(self, index: int) -> LayerWeights:
        layer = f"model.layers.{index}"
        attention = f"{layer}.self_attn"

        def qkv(member: int) -> Tensor:
            gain_D = self._read(member, f"{layer}.input_layernorm.weight")
            query, key, value = (
                self._read(member, f"{attention}.{name}_proj.weight") for name in "qkv"
            )
            return (torch.cat([self._order(query), self._order(key), value]) * gain_D).T

        def qkv_bias(member: int) -> Tensor:
            query, key, value = (
                self._read(member, f"{attention}.{name}_proj.bias") for name in "qkv"
            )
            return torch.cat([self._order(query), self._order(key), value])

        def qk_gain(member: int) -> Tensor:
            shape = self._architecture.shape
            query_d, key_d = (
                self._order(self._read(member, f"{attention}.{name}_norm.weight")) for name in "qk"
            )
            return torch.cat(
                [query_d.expand(shape.num_heads, -1), key_d.expand(shape.num_kv_heads, -1)]
            )

        def bias(member: int, *names: str) -> Tensor:
            return torch.cat([self._read(member, f"{layer}.{name}.bias") for name in names])

        def gate_up(member: int) -> Tensor:
            gain_D = self._read(member, f"{layer}.post_attention_layernorm.weight")
            gate, up = (
                self._read(member, f"{layer}.mlp.{name}_proj.weight") for name in ("gate", "up")
            )
            return (torch.cat([gate, up]) * gain_D).T

        known = self._architecture
        return LayerWeights(
            qkv_MDQ=self._stack(qkv),
            qkv_bias_MQ=self._stack(qkv_bias) if known.qkv_bias else None,
            qk_gain_MHd=self._stack(qk_gain) if known.qk_norm else None,
            out_MQD=self._stack(lambda m: self._read(m, f"{attention}.o_proj.weight").T),
            out_bias_MD=self._stack(lambda m: bias(m, "self_attn.o_proj"))
            if known.output_bias
            else None,
            gate_up_MDF=self._stack(gate_up),
            gate_up_bias_MF=self._stack(lambda m: bias(m, "mlp.gate_proj", "mlp.up_proj"))
            if known.mlp_bias
            else None,
            down_MFD=self._stack(lambda m: self._read(m, f"{layer}.mlp.down_proj.weight").T),
            down_bias_MD=self._stack(lambda m: bias(m, "mlp.down_proj"))
            if known.mlp_bias
            else None,
        )

    def _is_tied(self, member: int) -> bool:
        """Whether a member's embeddings are its head, as it is where its file has but one of them.

        A file with two that differ has two, whatever its config says (transformers' rule).
        """
        if all(self._checkpoints.has(member, name) for name in (EMBEDDING, HEAD)):
            return torch.equal(self._read(member, EMBEDDING), self._read(member, HEAD))
        return True

    def _read_either(self, member: int, name: str, other: str) -> Tensor:
        return self._read(member, name if self._checkpoints.has(member, name) else other)

    def _read(self, member: int, name: str) -> Tensor:
        return self._checkpoints.read(member, name)

    def _order(self, heads: Tensor) -> Tensor:
        """Put row i of each head next to row i + d/2 if wanted; `heads` is [heads·d, ...]."""
        if not self._rotary_pairs:
            return heads
        half = self._architecture.shape.head_dim // 2
        return heads.view(-1, 2, half, *heads.shape[1:]).transpose(1, 2).reshape(heads.shape)

    def _stack(self, one: _ReadMember) -> Tensor:
        """Stack `one(member)` of all members, without a second copy of the whole."""
        first = one(0)
        stacked = torch.empty(
            (self._num_members, *first.shape), device=self._device, dtype=self._dtype
        )
        stacked[0] = first
        for member in range(1, self._num_members):
            stacked[member] = one(member)
        return stacked
