"""Weights of M same-shaped checkpoints, stacked into tensors with a leading member axis.

Shapes: M members, D hidden, H query heads, K key/value heads, d head size, F feed-forward, V
vocabulary. Matrices are [M, in, out]; how they are kept, `matrices` says (float32 in this order is
1.1 to 3 times faster on CPU than in the checkpoint's).

Changes against the checkpoint, none of which changes the function computed:

- query, key and value are one matrix, and so are gate and up;
- the gain of a norm is multiplied into the projection that follows it, and so is what multiplies
  scores, logits or what a layer adds into the matrix that makes them;
- if wanted, dimension i stands next to dimension i + d/2 within each query and key head, so that a
  rotary pair is one complex number (scores do not depend on the order inside a head).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Generic

import torch
from safetensors import safe_open
from torch import Tensor

from models.card import ModelCard
from models.engines.stacked.architecture import (
    EMBEDDING,
    HEAD,
    NORMS_AFTER,
    NORMS_BEFORE,
    Architecture,
)
from models.engines.stacked.matrices import MatricesT, Pack
from models.errors import PoolError
from models.sources.safetensors import weight_files

_ReadMember = Callable[[int], Tensor]


@dataclass(frozen=True, kw_only=True)
class LayerWeights(Generic[MatricesT]):
    """One layer of all members; None where the architecture has no such weight."""

    qkv_MDQ: MatricesT  # Q = (H + 2K)·d
    qkv_bias_MQ: Tensor | None
    qk_gain_MHd: Tensor | None  # query heads, then key heads
    out_MQD: MatricesT
    out_bias_MD: Tensor | None
    out_gain_MD: Tensor | None  # of a norm after attention
    gate_up_MDF: MatricesT  # gate, then up: 2F columns
    gate_up_bias_MF: Tensor | None
    down_MFD: MatricesT
    down_bias_MD: Tensor | None
    down_gain_MD: Tensor | None  # of a norm after the feed-forward


@dataclass(frozen=True, kw_only=True)
class Weights(Generic[MatricesT]):
    """All members. With tied embeddings `embed_MVD` is a transposed view of `head_MDV`, or None
    where that is of integers, which can be read one by one.
    """

    embed_MVD: Tensor | None
    layers: tuple[LayerWeights[MatricesT], ...]
    final_gain_MD: Tensor
    head_MDV: MatricesT


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
    pack: Pack[MatricesT],
    rotary_pairs: bool = True,
) -> Weights[MatricesT]:
    """Stack the checkpoints' weights on `device`; `PoolError` names one that is missing.

    `pack` says how the matrices are kept. `rotary_pairs` puts the two dimensions of each rotary
    pair side by side; without it they stand half a head apart, as in the checkpoint.
    """
    with ExitStack() as stack:
        return _Loader(
            _Checkpoints(cards, stack),
            len(cards),
            architecture,
            device=device,
            dtype=dtype,
            pack=pack,
            rotary_pairs=rotary_pairs,
        ).load()


class _Loader(Generic[MatricesT]):
    def __init__(
        self,
        checkpoints: _Checkpoints,
        num_members: int,
        architecture: Architecture,
        *,
        device: torch.device,
        dtype: torch.dtype,
        pack: Pack[MatricesT],
        rotary_pairs: bool,
    ) -> None:
        self._checkpoints = checkpoints
        self._num_members = num_members
        self._architecture = architecture
        self._device = device
        self._dtype = dtype
        self._pack = pack
        self._rotary_pairs = rotary_pairs

    def load(self) -> Weights[MatricesT]:
        head_MDV = self._matrices(HEAD, lambda m: self._read_either(m, HEAD, EMBEDDING).T)
        embed_MVD = None
        if not all(self._is_tied(member) for member in range(self._num_members)):
            embed_MVD = self._stack(lambda m: self._read_either(m, EMBEDDING, HEAD))
        elif isinstance(head_MDV, Tensor):
            embed_MVD = head_MDV.transpose(1, 2)
        return Weights(
            embed_MVD=embed_MVD,
            layers=tuple(self._layer(i) for i in range(self._architecture.shape.num_layers)),
            final_gain_MD=self._stack(
                lambda m: self._gain(m, "model.norm") * self._architecture.logit_scale
            ),
            head_MDV=head_MDV,
        )

    def _layer(self, index: int) -> LayerWeights[MatricesT]:
        layer, known, shape = f"model.layers.{index}", self._architecture, self._architecture.shape
        query_size, key_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        # Attention multiplies scores by d ** -0.5; whatever else is wanted goes into the queries.
        score_scale = known.attention_scale * math.sqrt(shape.head_dim)
        before, after = NORMS_BEFORE[known.norms], NORMS_AFTER[known.norms]

        def projections(member: int, packed: str, apart: tuple[str, ...], kind: str) -> Tensor:
            names = (packed,) if known.packed else apart
            return torch.cat([self._read(member, f"{layer}.{name}_proj.{kind}") for name in names])

        def qkv(member: int, kind: str) -> Tensor:
            names = tuple(f"self_attn.{name}" for name in "qkv")
            rows = projections(member, "self_attn.qkv", names, kind)
            query, key, value = torch.split(rows, [query_size, key_size, key_size])
            if known.head_norms == "none":
                query = query * score_scale
            return torch.cat([self._order(query), self._order(key), value])

        def gate_up(member: int, kind: str) -> Tensor:
            return projections(member, "mlp.gate_up", ("mlp.gate", "mlp.up"), kind)

        def back(member: int, name: str, kind: str) -> Tensor:
            """Weight or bias of a projection whose output a layer adds to its input."""
            return self._read(member, f"{layer}.{name}_proj.{kind}") * known.residual_scale

        def normed(matrix: Tensor, member: int, norm: int) -> Tensor:
            """Multiply the gain of the norm that stands before into `matrix`, if one does."""
            return matrix * self._gain(member, f"{layer}.{before[norm]}") if before else matrix

        def qk_gain(member: int) -> Tensor:
            query, key = (
                self._order(self._gain(member, f"{layer}.self_attn.{name}_norm")) for name in "qk"
            )
            heads = [
                gain.view(-1, shape.head_dim).expand(number, -1)
                for gain, number in ((query, shape.num_heads), (key, shape.num_kv_heads))
            ]
            return torch.cat([heads[0] * score_scale, heads[1]])

        def after_gain(norm: int) -> Tensor | None:
            return self._stack(lambda m: self._gain(m, f"{layer}.{after[norm]}")) if after else None

        def if_(wanted: bool, one: _ReadMember) -> Tensor | None:
            return self._stack(one) if wanted else None

        return LayerWeights(
            qkv_MDQ=self._matrices("qkv", lambda m: normed(qkv(m, "weight"), m, 0).T),
            qkv_bias_MQ=if_(known.qkv_bias, lambda m: qkv(m, "bias")),
            qk_gain_MHd=if_(known.head_norms != "none", qk_gain),
            out_MQD=self._matrices("out", lambda m: back(m, "self_attn.o", "weight").T),
            out_bias_MD=if_(known.output_bias, lambda m: back(m, "self_attn.o", "bias")),
            out_gain_MD=after_gain(0),
            gate_up_MDF=self._matrices("gate_up", lambda m: normed(gate_up(m, "weight"), m, 1).T),
            gate_up_bias_MF=if_(known.mlp_bias, lambda m: gate_up(m, "bias")),
            down_MFD=self._matrices("down", lambda m: back(m, "mlp.down", "weight").T),
            down_bias_MD=if_(known.mlp_bias, lambda m: back(m, "mlp.down", "bias")),
            down_gain_MD=after_gain(1),
        )

    def _gain(self, member: int, norm: str) -> Tensor:
        gain = self._read(member, f"{norm}.weight")
        return gain + 1 if self._architecture.gains_from_one else gain

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

    def _matrices(self, name: str, one: _ReadMember) -> MatricesT:
        return self._pack(name, self._stack(one))

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
