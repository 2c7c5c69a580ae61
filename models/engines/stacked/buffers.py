"""The tensors a step writes to, and the views of them that its operations take.

Shapes as in `model`. At one token per step, making views and allocating costs as much as
computing, so both are done once per layout: every layer, and every step while the same requests
decode, reuses them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.engines.stacked.architecture import Architecture
from models.engines.stacked.attention import (
    Attention,
    Padded,
    PaddedAttention,
    Path,
    Span,
    SpanAttention,
)
from models.engines.stacked.layout import Layout
from models.engines.stacked.product import Product


class Norm:
    """Root-mean-square norm of the rows of `x`, without gain, into `y`."""

    def __init__(self, x_nD: Tensor, y_nD: Tensor, eps: float) -> None:
        size = x_nD.shape[-1]
        self._x, self._y, self._eps, self._size = x_nD, y_nD, eps, size
        # On CPU the mean square is faster as a product of each row with itself (5 µs against 15).
        self._by_product = x_nD.device.type == "cpu" and x_nD.dtype == torch.float32
        if self._by_product:
            self._eps_111 = x_nD.new_full((1, 1, 1), eps)
            self._left = x_nD.view(-1, 1, size)
            self._right = self._left.transpose(1, 2)
            self._scale_n11 = x_nD.new_empty(self._left.shape[0], 1, 1)
            self._scale = self._scale_n11.view(*x_nD.shape[:-1], 1)

    def __call__(self) -> None:
        """Compute it."""
        if not self._by_product:
            self._y.copy_(torch.nn.functional.rms_norm(self._x, (self._size,), None, self._eps))
            return
        torch.baddbmm(
            self._eps_111, self._left, self._right, alpha=1 / self._size, out=self._scale_n11
        )
        self._scale_n11.rsqrt_()
        torch.mul(self._x, self._scale, out=self._y)


class Buffers:
    """Everything one layout's forward pass writes."""

    def __init__(
        self,
        architecture: Architecture,
        layout: Layout,
        like: Tensor,
        *,
        keeps_copies: bool,
    ) -> None:
        shape, eps = architecture.shape, architecture.norm_eps
        num_rows, rows = len(layout.positions_N), layout.rows
        num_heads, num_kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        query_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim

        def empty(width: int) -> Tensor:
            return like.new_empty(num_rows, width)

        self.x_ND, normed_ND = empty(shape.hidden_size), empty(shape.hidden_size)
        qkv_NQ = empty(query_size + 2 * kv_size)
        attended_NQ = empty(query_size)
        self.gate_up_NF, self.activated_NF = (
            empty(2 * shape.intermediate_size),
            empty(shape.intermediate_size),
        )
        self.norm = Norm(self.x_ND, normed_ND, eps)
        self.normed_ND = normed_ND
        if architecture.norms != "before":  # what a layer adds is normed before it is added
            self.added_ND = empty(shape.hidden_size)
            self.norm_added = Norm(self.added_ND, normed_ND, eps)
            self.attention_apart = Product(attended_NQ, self.added_ND, rows)
            self.feed_forward_apart = Product(self.activated_NF, self.added_ND, rows)
        self.to_qkv = Product(normed_ND, qkv_NQ, rows)
        self.from_attention = Product(attended_NQ, self.x_ND, rows)
        self.to_gate_up = Product(normed_ND, self.gate_up_NF, rows)
        self.from_activated = Product(self.activated_NF, self.x_ND, rows)

        self.qkv_NQ = qkv_NQ
        self.kv_NQ = qkv_NQ[:, query_size:]
        self.heads_NHd = qkv_NQ[:, : query_size + kv_size].view(num_rows, -1, head_dim)
        self.gate_NF, self.up_NF = self.gate_up_NF.chunk(2, dim=-1)

        # Attention runs in request-major order: on copies where that is another order.
        self.query_NQ, self.attended_NQ = qkv_NQ[:, :query_size], attended_NQ
        self.ordered_query_NQ, self.ordered_output_NQ = self.query_NQ, attended_NQ
        if layout.order is not None:
            self.ordered_query_NQ, self.ordered_output_NQ = empty(query_size), empty(query_size)
        self.attention = [self._bind(path, architecture, keeps_copies) for path in layout.paths]

    def _bind(self, path: Path, architecture: Architecture, keeps_copies: bool) -> Attention:
        query, output = self.ordered_query_NQ[path.rows], self.ordered_output_NQ[path.rows]
        match path:
            case Span():
                return SpanAttention(path, architecture, query, output)
            case Padded():
                return PaddedAttention(path, architecture, query, output, keeps_copies=keeps_copies)
