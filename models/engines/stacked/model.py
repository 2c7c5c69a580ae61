"""The forward pass of M members at once: a transformer whose weight matrices are block-diagonal.

Shapes: N rows of a step (see `layout`), M members, D hidden, H query heads, K key/value heads,
G = H / K queries per key/value head, d head size, Q = (H + 2K)·d, F feed-forward, V vocabulary,
T tokens of one request in this step, W its cached tokens.

The per-step cost on CPU is mostly the number of tensor operations, so there are few: one product
for query, key and value, one for gate and up, rotation as one complex product, residuals added by
the product itself. It knows nothing of requests, sampling or fusion.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from models.engines.stacked.architecture import Architecture
from models.engines.stacked.cache import Arena
from models.engines.stacked.layout import Grouping, Layout, Padded, Span
from models.engines.stacked.weights import LayerWeights, Weights


class StackedModel:
    """Computes next-token logits of every lane; see the module's docstring."""

    def __init__(self, architecture: Architecture, weights: Weights) -> None:
        shape = architecture.shape
        device, self._dtype = weights.head_MDV.device, weights.head_MDV.dtype
        self._weights = weights
        self._num_heads = shape.num_heads
        self._num_kv_heads = shape.num_kv_heads
        self._head_dim = shape.head_dim
        self._norm_eps = architecture.norm_eps
        self._eps_111 = torch.full((1, 1, 1), architecture.norm_eps, device=device)
        self._grouped = device.type == "cuda"
        angles = torch.outer(
            torch.arange(architecture.context_tokens, dtype=torch.float32),
            architecture.frequencies(),
        )
        # [positions, 1, d / 2], complex: one rotation for all heads
        self._rotations_T1d = torch.polar(torch.ones_like(angles), angles)[:, None].to(device)

    def forward(self, layout: Layout, arena: Arena) -> Tensor:
        """Run the step's tokens, write their keys and values; return hidden states [N, D]."""
        members_N = layout.rows.members_N
        x_ND = self._weights.embed_MVD[members_N, layout.tokens_N]
        rotations_N1d = self._rotations_T1d.index_select(0, layout.positions_N)
        query_size = self._num_heads * self._head_dim
        for weights, cache in zip(self._weights.layers, arena.layers, strict=True):
            qkv_NQ = self._project(self._norm(x_ND), weights.qkv_MDQ, layout.rows)
            if weights.qkv_bias_MQ is not None:
                qkv_NQ += weights.qkv_bias_MQ.index_select(0, members_N)
            self._rotate(qkv_NQ, rotations_N1d, weights, members_N)
            cache.index_copy_(0, layout.cache_rows_N, qkv_NQ[:, query_size:])
            attended_NQ = self._attend(qkv_NQ[:, :query_size], cache, layout)
            self._project_onto(x_ND, attended_NQ, weights.out_MQD, layout.rows)
            if weights.out_bias_MD is not None:
                x_ND += weights.out_bias_MD.index_select(0, members_N)
            gate_up_NF = self._project(self._norm(x_ND), weights.gate_up_MDF, layout.rows)
            gate_NF, up_NF = gate_up_NF.chunk(2, dim=-1)
            self._project_onto(x_ND, F.silu(gate_NF).mul_(up_NF), weights.down_MFD, layout.rows)
        return x_ND

    def logits(self, hidden_LD: Tensor, lanes: Grouping) -> Tensor:
        """Return the next-token logits of hidden states, [L, V], float32."""
        gain_LD = self._weights.final_gain_MD.index_select(0, lanes.members_N)
        return self._project(
            self._norm(hidden_LD).mul_(gain_LD), self._weights.head_MDV, lanes
        ).float()

    def _norm(self, x: Tensor) -> Tensor:
        """Root-mean-square norm of the last dimension, without gain."""
        size = x.shape[-1]
        if x.is_cuda or x.dtype != torch.float32:
            return F.rms_norm(x, (size,), None, self._norm_eps)
        # On CPU the mean square is faster as a product with itself (8 µs against 15).
        x_n1D = x.reshape(-1, 1, size)
        mean_square = torch.baddbmm(self._eps_111, x_n1D, x_n1D.transpose(1, 2), alpha=1 / size)
        return x * mean_square.rsqrt_().view(*x.shape[:-1], 1)

    def _rotate(
        self, qkv_NQ: Tensor, rotations_N1d: Tensor, weights: LayerWeights, members_N: Tensor
    ) -> None:
        """Apply the rotary embedding to queries and keys in place (after Qwen3's norm)."""
        num_heads = self._num_heads + self._num_kv_heads
        heads_NHd = qkv_NQ[:, : num_heads * self._head_dim].view(-1, num_heads, self._head_dim)
        if weights.qk_gain_MHd is not None:
            gain_NHd = weights.qk_gain_MHd.index_select(0, members_N)
            torch.mul(self._norm(heads_NHd), gain_NHd, out=heads_NHd)
        if heads_NHd.dtype == torch.float32:
            torch.view_as_complex(heads_NHd.view(*heads_NHd.shape[:2], -1, 2)).mul_(rotations_N1d)
        else:
            pairs = torch.view_as_complex(heads_NHd.float().view(*heads_NHd.shape[:2], -1, 2))
            heads_NHd.copy_(torch.view_as_real(pairs * rotations_N1d).flatten(-2))

    def _project(self, x_NI: Tensor, weight_MIO: Tensor, rows: Grouping) -> Tensor:
        """Multiply each row by its member's matrix; [N, out]."""
        if self._grouped:
            return F.grouped_mm(x_NI, weight_MIO, offs=rows.ends_M)
        y_NO = x_NI.new_empty(len(x_NI), weight_MIO.shape[-1])
        for run in rows.runs:
            torch.bmm(
                x_NI[run.rows].view(run.num_members, run.rows_per_member, -1),
                weight_MIO[run.members],
                out=y_NO[run.rows].view(run.num_members, run.rows_per_member, -1),
            )
        return y_NO

    def _project_onto(self, y_NO: Tensor, x_NI: Tensor, weight_MIO: Tensor, rows: Grouping) -> None:
        """Add each row's product with its member's matrix to `y_NO`, in place."""
        if self._grouped:
            y_NO += F.grouped_mm(x_NI, weight_MIO, offs=rows.ends_M)
            return
        for run in rows.runs:
            y_NO[run.rows].view(run.num_members, run.rows_per_member, -1).baddbmm_(
                x_NI[run.rows].view(run.num_members, run.rows_per_member, -1),
                weight_MIO[run.members],
            )

    def _attend(self, query_NQ: Tensor, cache: Tensor, layout: Layout) -> Tensor:
        """Attend from the step's rows to everything cached; member-major in and out."""
        if layout.to_requests_N is not None:
            query_NQ = query_NQ.index_select(0, layout.to_requests_N)
        outputs = [self._attend_span(query_NQ[span.rows], cache, span) for span in layout.spans]
        if layout.padded is not None:
            padded = layout.padded
            outputs.insert(0, self._attend_padded(query_NQ[padded.rows], cache, padded))
        output_NQ = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if layout.to_members_N is not None:
            output_NQ = output_NQ.index_select(0, layout.to_members_N)
        return output_NQ

    def _attend_span(self, query_nQ: Tensor, cache: Tensor, span: Span) -> Tensor:
        """Attend within one request; its keys and values are views of the cache."""
        row_size = cache.shape[1]
        shape = (span.num_lanes, self._num_kv_heads, span.num_cached, self._head_dim)
        strides = (span.capacity_tokens * row_size, self._head_dim, row_size, 1)
        first = cache.storage_offset() + span.cache_row * row_size
        key_LKWd = cache.as_strided(shape, strides, first)
        value_LKWd = cache.as_strided(shape, strides, first + row_size // 2)
        if span.num_tokens == 1:
            # A key/value head's queries all see every cached token: they are its "tokens".
            query = query_nQ.view(len(query_nQ), self._num_kv_heads, -1, self._head_dim)
            output = F.scaled_dot_product_attention(query, key_LKWd, value_LKWd)
            return output.reshape(span.num_lanes, -1)
        query = query_nQ.view(span.num_lanes, span.num_tokens, self._num_heads, -1)
        from_start = span.num_cached == span.num_tokens
        output = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key_LKWd,
            value_LKWd,
            attn_mask=None if from_start else _causal(span, query_nQ.device),
            is_causal=from_start,
            enable_gqa=True,
        )
        return output.transpose(1, 2).reshape(len(query_nQ), -1)

    def _attend_padded(self, query_nQ: Tensor, cache: Tensor, padded: Padded) -> Tensor:
        """Attend for many decoding lanes at once, over copies padded to the longest."""
        num_lanes, width = padded.cache_rows_LW.shape
        rows = cache.index_select(0, padded.cache_rows_LW.view(-1))
        key, value = (
            half.view(num_lanes, width, self._num_kv_heads, self._head_dim).transpose(1, 2)
            for half in rows.chunk(2, dim=1)
        )
        query = query_nQ.view(len(query_nQ), self._num_kv_heads, -1, self._head_dim)
        mask = padded.mask_LW[:, None, None].to(self._dtype)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return output.reshape(num_lanes, -1)


def _causal(span: Span, device: torch.device) -> Tensor:
    """Return which cached tokens each of the step's tokens sees, [T, W], for a later chunk."""
    mask = torch.ones(span.num_tokens, span.num_cached, dtype=torch.bool, device=device)
    return mask.tril_(span.num_cached - span.num_tokens)
