"""The forward pass of M members at once: a transformer whose weight matrices are block-diagonal.

Shapes: N rows of a step (see `layout`), L lanes, M members, D hidden, H query heads, K key/value
heads, G = H / K queries per key/value head, d head size, Q = (H + 2K)·d, F feed-forward, V
vocabulary, T tokens of one request in this step.

The cost of a decoding step on CPU is mostly the number of tensor operations, so there are few: one
product for query, key and value, one for gate and up, rotation as one complex product, residuals
added by the products themselves, everything into `buffers` that are made once. It knows nothing of
requests, sampling or fusion.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from models.engines.stacked.architecture import Architecture
from models.engines.stacked.buffers import Buffers, Norm, PaddedBuffers, Product, SpanBuffers
from models.engines.stacked.cache import Arena
from models.engines.stacked.layout import Grouping, Layout
from models.engines.stacked.rotary import rotations
from models.engines.stacked.weights import LayerWeights, Weights


class StackedModel:
    """Computes next-token logits of every lane; see the module's docstring."""

    def __init__(self, architecture: Architecture, weights: Weights) -> None:
        self._shape = architecture.shape
        self._norm_eps = architecture.norm_eps
        self._weights = weights
        self._layout: Layout | None = None
        self._buffers: Buffers | None = None
        shape = architecture.shape
        rotations_Td = rotations(architecture.rotary, shape.head_dim, architecture.context_tokens)
        # [positions, 1, d / 2], complex: one rotation for all heads
        self._rotations_T1d = rotations_Td[:, None].to(weights.head_MDV.device)

    def buffers(self, layout: Layout, *, keeps_copies: bool) -> Buffers:
        """Return what a forward pass over `layout` writes to; of copies see `PaddedBuffers`."""
        head_MDV = self._weights.head_MDV
        return Buffers(self._shape, self._norm_eps, layout, head_MDV, keeps_copies=keeps_copies)

    def forward(self, layout: Layout, arena: Arena, buffers: Buffers | None = None) -> Tensor:
        """Run the step's tokens, write their keys and values; return hidden states [N, D].

        The result is valid until the next call, or with `buffers` until the next one with these.
        """
        members_N = layout.rows.members_N
        b = buffers or self._buffers_of(layout)
        x_ND = b.x_ND.copy_(self._weights.embed_MVD[members_N, layout.tokens_N])
        rotations_N1d = self._rotations_T1d.index_select(0, layout.positions_N)
        for layer, (weights, cache) in enumerate(
            zip(self._weights.layers, arena.layers, strict=True)
        ):
            b.norm()
            b.to_qkv.write(weights.qkv_MDQ)
            if weights.qkv_bias_MQ is not None:
                b.qkv_NQ += weights.qkv_bias_MQ.index_select(0, members_N)
            self._rotate(b.heads_NHd, rotations_N1d, weights, members_N)
            cache.index_copy_(0, layout.cache_rows_N, b.kv_NQ)
            self._attend(b, cache, layout, layer)
            b.from_attention.add(weights.out_MQD)
            if weights.out_bias_MD is not None:
                x_ND += weights.out_bias_MD.index_select(0, members_N)
            b.norm()
            b.to_gate_up.write(weights.gate_up_MDF)
            if weights.gate_up_bias_MF is not None:
                b.gate_up_NF += weights.gate_up_bias_MF.index_select(0, members_N)
            torch.mul(F.silu(b.gate_NF, inplace=True), b.up_NF, out=b.activated_NF)
            b.from_activated.add(weights.down_MFD)
            if weights.down_bias_MD is not None:
                x_ND += weights.down_bias_MD.index_select(0, members_N)
        return x_ND

    def logits(self, hidden_LD: Tensor, lanes: Grouping) -> Tensor:
        """Return the next-token logits of hidden states, [L, V], float32."""
        normed_LD = torch.empty_like(hidden_LD)
        Norm(hidden_LD, normed_LD, self._norm_eps)()
        normed_LD *= self._weights.final_gain_MD.index_select(0, lanes.members_N)
        logits_LV = hidden_LD.new_empty(len(hidden_LD), self._shape.vocab_size)
        Product(normed_LD, logits_LV, lanes).write(self._weights.head_MDV)
        return logits_LV.float()

    def _buffers_of(self, layout: Layout) -> Buffers:
        if self._buffers is None or self._layout is not layout:
            # On CUDA copies are cheap and memory is dear.
            keeps_copies = not layout.positions_N.is_cuda
            self._layout = layout
            self._buffers = self.buffers(layout, keeps_copies=keeps_copies)
        return self._buffers

    def _rotate(
        self, heads_NHd: Tensor, rotations_N1d: Tensor, weights: LayerWeights, members_N: Tensor
    ) -> None:
        """Apply the rotary embedding to queries and keys in place (after Qwen3's norm)."""
        if weights.qk_gain_MHd is not None:
            normed_NHd = F.rms_norm(heads_NHd, heads_NHd.shape[-1:], None, self._norm_eps)
            torch.mul(normed_NHd, weights.qk_gain_MHd.index_select(0, members_N), out=heads_NHd)
        if heads_NHd.dtype == torch.float32:
            _complex(heads_NHd).mul_(rotations_N1d)
        else:
            rotated = _complex(heads_NHd.float()) * rotations_N1d
            heads_NHd.copy_(torch.view_as_real(rotated).flatten(-2))

    def _attend(self, b: Buffers, cache: Tensor, layout: Layout, layer: int) -> None:
        """Attend from the step's rows to everything cached."""
        if layout.to_requests_N is not None:
            torch.index_select(b.query_NQ, 0, layout.to_requests_N, out=b.ordered_query_NQ)
        if b.padded is not None:
            _attend_padded(b.padded, cache, layer)
        for span in b.spans:
            self._attend_span(span, cache)
        if layout.to_members_N is not None:
            torch.index_select(b.ordered_output_NQ, 0, layout.to_members_N, out=b.attended_NQ)

    def _attend_span(self, buffers: SpanBuffers, cache: Tensor) -> None:
        """Attend within one request; its keys and values are views of the cache."""
        span, row_size, head_dim = buffers.span, cache.shape[1], self._shape.head_dim
        shape = (span.num_lanes, self._shape.num_kv_heads, span.num_cached, head_dim)
        strides = (span.capacity_tokens * row_size, head_dim, row_size, 1)
        first = cache.storage_offset() + span.cache_row * row_size
        output = F.scaled_dot_product_attention(
            buffers.query,
            cache.as_strided(shape, strides, first),
            cache.as_strided(shape, strides, first + row_size // 2),
            attn_mask=buffers.mask,
            is_causal=span.num_tokens > 1 and buffers.mask is None,
            enable_gqa=span.num_tokens > 1,
        )
        buffers.output.copy_(output)


def _attend_padded(buffers: PaddedBuffers, cache: Tensor, layer: int) -> None:
    """Attend for many decoding lanes at once, over copies padded to the longest."""
    copy, padded = buffers.copies[layer], buffers.padded
    if copy.filled:
        newest = cache.index_select(0, padded.newest_rows_L)
        copy.rows.index_copy_(0, padded.newest_L, newest)
    else:
        torch.index_select(cache, 0, padded.cache_rows_LW.view(-1), out=copy.rows)
        copy.filled = buffers.keeps
    output = F.scaled_dot_product_attention(
        buffers.query,
        copy.key,
        copy.value,
        attn_mask=buffers.mask.to(buffers.query.dtype),
    )
    buffers.output.copy_(output)


def _complex(heads_NHd: Tensor) -> Tensor:
    """View neighbouring pairs as complex numbers."""
    return torch.view_as_complex(heads_NHd.view(*heads_NHd.shape[:2], -1, 2))
