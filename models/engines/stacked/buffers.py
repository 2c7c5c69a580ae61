"""The tensors a step writes to, and the views of them that its operations take.

Shapes as in `model`. At one token per step, making views and allocating costs as much as
computing, so both are done once per layout: every layer, and every step while the same requests
decode, reuses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.engines.stacked.architecture import Architecture
from models.engines.stacked.layout import Grouping, Layout, Padded, Span


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


class Product:
    """Each row of `x` times its member's matrix, into `y` or onto it.

    On CPU one batched product per run of members with equally many rows, or a plain one for a run
    of one (a third faster); on CUDA one grouped product, which takes rows as they come.
    """

    def __init__(self, x_NI: Tensor, y_NO: Tensor, rows: Grouping) -> None:
        self._grouped = x_NI.is_cuda or rows.runs is None
        self._x, self._y, self._ends_M = x_NI, y_NO, rows.ends_M
        runs = rows.runs or ()
        self._whole = len(runs) == 1 and runs[0].num_members == len(rows.ends_M)
        self._runs = [
            (
                run.members,
                x_NI[run.rows].view(run.num_members, run.rows_per_member, -1),
                y_NO[run.rows].view(run.num_members, run.rows_per_member, -1),
            )
            for run in runs
            if run.num_members > 1
        ]
        self._single = [
            (run.first_member, x_NI[run.rows], y_NO[run.rows])
            for run in runs
            if run.num_members == 1
        ]

    def write(self, weight_MIO: Tensor) -> None:
        """Set `y` to the product."""
        if self._grouped:
            self._y.copy_(self._multiply(weight_MIO))
            return
        for members, x, y in self._runs:
            torch.bmm(x, weight_MIO if self._whole else weight_MIO[members], out=y)
        for member, x, y in self._single:
            torch.mm(x, weight_MIO[member], out=y)

    def add(self, weight_MIO: Tensor) -> None:
        """Add the product to `y`."""
        if self._grouped:
            self._y += self._multiply(weight_MIO)
            return
        for members, x, y in self._runs:
            y.baddbmm_(x, weight_MIO if self._whole else weight_MIO[members])
        for member, x, y in self._single:
            y.addmm_(x, weight_MIO[member])

    def _multiply(self, weight_MIO: Tensor) -> Tensor:
        return torch.nn.functional.grouped_mm(self._x, weight_MIO, offs=self._ends_M)


@dataclass(frozen=True, slots=True)
class SpanBuffers:
    """One request's queries and outputs, in the shapes that attention takes."""

    span: Span
    query: Tensor  # decoding [K lanes, K heads, G, d], else [lanes, H, T, d]
    output: Tensor
    masks: Mapping[int | None, Tensor | None]  # by window; None where causality needs none


@dataclass(frozen=True, slots=True)
class PaddedBuffers:
    """The same for decoding lanes that attend together, over a copy of their cache rows.

    A layer may keep its copy while the layout stays: then a step adds only the rows that it has
    written. Otherwise all layers share one.
    """

    padded: Padded
    copies: list[PaddedCopy]  # of each layer
    keeps: bool
    query: Tensor
    output: Tensor
    mask: Tensor


@dataclass(slots=True)
class PaddedCopy:
    """One layer's rows, [lanes · width, row], and their keys and values, [lanes, K, width, d]."""

    rows: Tensor
    key: Tensor
    value: Tensor
    filled: bool = False


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
        self._windows = {layer.window_tokens for layer in architecture.layers}
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
        if layout.to_requests_N is not None:
            self.ordered_query_NQ, self.ordered_output_NQ = empty(query_size), empty(query_size)
        self._shape, self._keeps_copies = shape, keeps_copies
        self.spans = [self._span(span) for span in layout.spans]
        self.padded = None if layout.padded is None else self._padded(layout.padded)

    def _span(self, span: Span) -> SpanBuffers:
        query, output = self.ordered_query_NQ[span.rows], self.ordered_output_NQ[span.rows]
        if span.num_tokens == 1:  # a window is a shorter view
            return SpanBuffers(span, self._grouped(query), self._grouped(output), {})
        split = (span.num_lanes, span.num_tokens, self._shape.num_heads, self._shape.head_dim)
        masks = {window: _mask(span, window, query.device) for window in self._windows}
        return SpanBuffers(
            span, query.view(split).transpose(1, 2), output.view(split).transpose(1, 2), masks
        )

    def _padded(self, padded: Padded) -> PaddedBuffers:
        num_layers, keeps = self._shape.num_layers, self._keeps_copies
        copies = [self._padded_copy(padded) for _ in range(num_layers if keeps else 1)]
        return PaddedBuffers(
            padded=padded,
            copies=copies if keeps else copies * num_layers,
            keeps=keeps,
            query=self._grouped(self.ordered_query_NQ[padded.rows]),
            output=self._grouped(self.ordered_output_NQ[padded.rows]),
            mask=padded.mask_LW[:, None, None],
        )

    def _padded_copy(self, padded: Padded) -> PaddedCopy:
        num_lanes, width = padded.cache_rows_LW.shape
        rows = self.kv_NQ.new_empty(num_lanes * width, self.kv_NQ.shape[1])
        key, value = (
            half.view(num_lanes, width, self._shape.num_kv_heads, -1).transpose(1, 2)
            for half in rows.chunk(2, dim=1)
        )
        return PaddedCopy(rows, key, value)

    def _grouped(self, rows_nQ: Tensor) -> Tensor:
        """View one token's heads as [lanes, K, G, d].

        The queries of one key/value head all see every cached token, so they may stand where
        attention expects the tokens of a sequence, and no mask or repetition is needed.
        """
        return rows_nQ.view(len(rows_nQ), self._shape.num_kv_heads, -1, self._shape.head_dim)


def _mask(span: Span, window_tokens: int | None, device: torch.device) -> Tensor | None:
    """Return which cached tokens each token of a chunk sees, [T, cached]; None: causality says."""
    narrow = window_tokens is not None and window_tokens < span.num_cached
    if span.num_cached == span.num_tokens and not narrow:
        return None
    earlier = span.num_cached - span.num_tokens
    mask = torch.ones(span.num_tokens, span.num_cached, dtype=torch.bool, device=device)
    mask.tril_(earlier)
    return mask.triu_(earlier - window_tokens + 1) if window_tokens is not None else mask
