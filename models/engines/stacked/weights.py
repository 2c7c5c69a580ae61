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
from typing import Any, Generic

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
from models.engines.stacked.matrices import MatricesT, Pack, Reordered
from models.errors import PoolError
from models.sources.safetensors import weight_files

_ReadMember = Callable[[int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """How one of a layer's matrices is made of a checkpoint's.

    The outputs of `modules` stand one after another and become `rows`, a linear map of [O, ...];
    each input is multiplied by the gain of the `norm` that stands before, if one does.
    """

    modules: tuple[str, ...]
    norm: str | None
    rows: Callable[[Tensor], Tensor]


def layer_matrices(known: Architecture, *, rotary_pairs: bool = True) -> dict[str, Matrix]:
    """Return the four matrices of every layer by name: qkv, out, gate_up and down."""
    shape, dims = known.shape, known.rotated_dims
    query_size, key_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim

    def qkv(rows: Tensor) -> Tensor:
        query, key, value = torch.split(rows, [query_size, key_size, key_size])
        if known.head_norms == "none":
            query = query * _score_scale(known)
        if rotary_pairs:
            query, key = (_paired(heads, shape.head_dim, dims) for heads in (query, key))
        return torch.cat([query, key, value])

    def back(rows: Tensor) -> Tensor:
        """Scale what a layer adds to its input."""
        return rows * known.residual_scale

    to_qkv: tuple[str, ...] = ("self_attn.qkv_proj",)
    to_gate_up: tuple[str, ...] = ("mlp.gate_up_proj",)
    if not known.packed:
        to_qkv = tuple(f"self_attn.{name}_proj" for name in "qkv")
        to_gate_up = ("mlp.gate_proj", "mlp.up_proj")
    attention_norm, feed_forward_norm = NORMS_BEFORE[known.norms] or (None, None)
    return {
        "qkv": Matrix(modules=to_qkv, norm=attention_norm, rows=qkv),
        "out": Matrix(modules=("self_attn.o_proj",), norm=None, rows=back),
        "gate_up": Matrix(modules=to_gate_up, norm=feed_forward_norm, rows=lambda rows: rows),
        "down": Matrix(modules=("mlp.down_proj",), norm=None, rows=back),
    }


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
    where that is of integers, which can be read one by one. Where only a kernel can read the head,
    the embedding stands beside it.
    """

    embed_MVD: Tensor | None
    layers: tuple[LayerWeights[MatricesT], ...]
    final_gain_MD: Tensor
    head_MDV: MatricesT


class Checkpoints:
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
        """Return whether a member has the tensor."""
        return name in self._files[member]

    def read(self, member: int, name: str) -> Tensor:
        """Return the tensor, float32; raises `PoolError` where it is missing."""
        tensor: Tensor = self._file(member, name).get_tensor(name).float()
        return tensor

    def shape(self, member: int, name: str) -> list[int]:
        """Return the tensor's shape; raises `PoolError` where it is missing."""
        shape: list[int] = self._file(member, name).get_slice(name).get_shape()
        return shape

    def _file(self, member: int, name: str) -> Any:  # noqa: ANN401 - safetensors has no types
        file = self._files[member].get(name)
        if file is None:
            raise PoolError(f"{self._cards[member].path}: the weight {name!r} is missing")
        return file


def read_gain(
    checkpoints: Checkpoints, member: int, norm: str, architecture: Architecture
) -> Tensor:
    """Return what a norm multiplies by."""
    gain = checkpoints.read(member, f"{norm}.weight")
    return gain + 1 if architecture.gains_from_one else gain


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
            Checkpoints(cards, stack),
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
        checkpoints: Checkpoints,
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
        self._layer_matrices = layer_matrices(architecture, rotary_pairs=rotary_pairs)

    def load(self) -> Weights[MatricesT]:
        head_MDV = self._matrices(HEAD, lambda m: self._read_either(m, HEAD, EMBEDDING).T)
        embed_MVD = None
        tied = all(self._is_tied(member) for member in range(self._num_members))
        if not tied or isinstance(head_MDV, Reordered):
            embed_MVD = self._stack(lambda m: self._read_either(m, EMBEDDING, HEAD))
            embed_MVD = _narrowed(embed_MVD) if isinstance(head_MDV, Reordered) else embed_MVD
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
        after = NORMS_AFTER[known.norms]

        def rows(name: str, member: int, kind: str) -> Tensor:
            """Weights [O, I], or biases [O], of the matrix called `name`."""
            matrix = self._layer_matrices[name]
            apart = [self._read(member, f"{layer}.{module}.{kind}") for module in matrix.modules]
            return matrix.rows(torch.cat(apart))

        def matrices(name: str) -> MatricesT:
            norm = self._layer_matrices[name].norm

            def one(member: int) -> Tensor:
                weight_OI = rows(name, member, "weight")
                return (weight_OI * self._gain(member, f"{layer}.{norm}") if norm else weight_OI).T

            return self._matrices(name, one)

        def biases(name: str, wanted: bool) -> Tensor | None:
            return self._stack(lambda m: rows(name, m, "bias")) if wanted else None

        def qk_gain(member: int) -> Tensor:
            query, key = (self._gain(member, f"{layer}.self_attn.{name}_norm") for name in "qk")
            if self._rotary_pairs:
                query, key = (
                    _paired(gain, shape.head_dim, known.rotated_dims) for gain in (query, key)
                )
            heads = [
                gain.view(-1, shape.head_dim).expand(number, -1)
                for gain, number in ((query, shape.num_heads), (key, shape.num_kv_heads))
            ]
            return torch.cat([heads[0] * _score_scale(known), heads[1]])

        def after_gain(norm: int) -> Tensor | None:
            return self._stack(lambda m: self._gain(m, f"{layer}.{after[norm]}")) if after else None

        return LayerWeights(
            qkv_MDQ=matrices("qkv"),
            qkv_bias_MQ=biases("qkv", known.qkv_bias),
            qk_gain_MHd=None if known.head_norms == "none" else self._stack(qk_gain),
            out_MQD=matrices("out"),
            out_bias_MD=biases("out", known.output_bias),
            out_gain_MD=after_gain(0),
            gate_up_MDF=matrices("gate_up"),
            gate_up_bias_MF=biases("gate_up", known.mlp_bias),
            down_MFD=matrices("down"),
            down_bias_MD=biases("down", known.mlp_bias),
            down_gain_MD=after_gain(1),
        )

    def _gain(self, member: int, norm: str) -> Tensor:
        return read_gain(self._checkpoints, member, norm, self._architecture)

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


def _narrowed(numbers: Tensor) -> Tensor:
    """Return the numbers in half the bytes where bfloat16 can tell them all, as of most files."""
    narrow = numbers.bfloat16()
    return narrow if torch.equal(narrow.to(numbers.dtype), numbers) else numbers


def _score_scale(known: Architecture) -> float:
    """Attention multiplies scores by d ** -0.5; whatever else is wanted goes into the queries."""
    return known.attention_scale * math.sqrt(known.shape.head_dim)


def _paired(heads: Tensor, head_dim: int, dims: int) -> Tensor:
    """Put row i of each head's first `dims` next to row i + dims/2; `heads` is [heads·d, ...]."""
    order = torch.arange(head_dim)
    order[:dims] = order[:dims].view(2, -1).T.flatten()
    return heads.view(-1, head_dim, *heads.shape[1:])[:, order].reshape(heads.shape)
