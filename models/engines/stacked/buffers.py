"""The tensors a step writes to, and the views of them that its operations take.

Shapes as in `model`. At one token per step, making views and allocating costs as much as
computing, so both are done once per layout: every layer, and every step while the same requests
decode, reuses them. Among them are the products of rows with their members' matrices, however these
are kept (I inputs, O outputs, R rank, n or N rows).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

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
from models.engines.stacked.layout import Grouping, Layout, Run
from models.engines.stacked.matrices import Adapted, Matrices
from models.precision import fast_bfloat16

# Where the processor has no instructions for bfloat16, each row costs as much as the first: more
# than these are faster in float32, where so many outputs at once stay in the processor's cache.
_MOST_BFLOAT16_ROWS, _CACHED_OUTPUTS = 4, 192


class Product:
    """Each row of `x` times its member's matrix, into `y` or onto it.

    On CPU one batched product per run of members with equally many rows, or a plain one for a run
    of one (a third faster); on CUDA one grouped product, which takes rows as they come.
    """

    def __init__(self, x_NI: Tensor, y_NO: Tensor, rows: Grouping) -> None:
        self._grouped = x_NI.is_cuda or not rows.runs
        self._widens = x_NI.dtype == torch.bfloat16 and not fast_bfloat16(x_NI.device)
        self._x, self._y, self._ends_M = x_NI, y_NO, rows.ends_M
        self._rows, runs = rows, rows.runs
        self._narrow: dict[int, _LowRank] = {}  # by rank
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

    def write(self, weight_MIO: Matrices) -> None:
        """Set `y` to the product."""
        if isinstance(weight_MIO, Adapted):
            self._of_base.write(weight_MIO.base)
            self._adapt(weight_MIO)
            return
        if not isinstance(weight_MIO, Tensor):
            for member, x, y in self._each:
                y.copy_(weight_MIO.times(x, member))
            return
        if self._grouped:
            self._y.copy_(self._multiply(weight_MIO))
            return
        if self._widens:
            for member, x, y in self._each:
                y.copy_(_widened(x, weight_MIO[member]))
            return
        for members, x, y in self._runs:
            torch.bmm(x, weight_MIO if self._whole else weight_MIO[members], out=y)
        for member, x, y in self._single:
            torch.mm(x, weight_MIO[member], out=y)

    def add(self, weight_MIO: Matrices) -> None:
        """Add the product to `y`."""
        if isinstance(weight_MIO, Adapted):
            self._of_base.add(weight_MIO.base)
            self._adapt(weight_MIO)
            return
        if not isinstance(weight_MIO, Tensor):
            for member, x, y in self._each:
                y.add_(weight_MIO.times(x, member))
            return
        if self._grouped:
            self._y += self._multiply(weight_MIO)
            return
        if self._widens:
            for member, x, y in self._each:
                y.add_(_widened(x, weight_MIO[member]))
            return
        for members, x, y in self._runs:
            y.baddbmm_(x, weight_MIO if self._whole else weight_MIO[members])
        for member, x, y in self._single:
            y.addmm_(x, weight_MIO[member])

    @cached_property
    def _of_base(self) -> Product:
        """All rows times one matrix, whosever they are."""
        members_N, num_rows = self._rows.members_N, len(self._x)
        ends_1 = torch.full_like(self._ends_M[:1], num_rows)
        one = Run(first_member=0, num_members=1, first_row=0, rows_per_member=num_rows)
        runs = (one,) if self._rows.runs else ()
        return Product(
            self._x, self._y, Grouping(torch.zeros_like(members_N), runs=runs, ends_M=ends_1)
        )

    def _adapt(self, weight: Adapted) -> None:
        """Add each member's own part; the base has none."""
        if weight.factors is None or (self._rows.runs and not _without_base(self._rows.runs)):
            return
        shrink_MIR, expand_MRO = weight.factors
        rank = shrink_MIR.shape[2]
        if rank not in self._narrow:
            rows = replace(self._rows, runs=_without_base(self._rows.runs))
            self._narrow[rank] = _LowRank(self._x, self._y, rows, like=shrink_MIR)
        self._narrow[rank].add(shrink_MIR, expand_MRO)

    @property
    def _each(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Every member's rows apart, for kernels that take one matrix."""
        if not self._rows.runs:
            assert len(self._rows.ends_M) == 1, "rows of several members come grouped"
            yield 0, self._x, self._y
        yield from self._single
        for members, x, y in self._runs:
            yield from zip(range(members.start, members.stop), x, y, strict=True)

    def _multiply(self, weight_MIO: Tensor) -> Tensor:
        return torch.nn.functional.grouped_mm(self._x, weight_MIO, offs=self._ends_M)


class _LowRank:
    """Adds to `y` what rows of `x` make through their members' factors, in the type of these."""

    def __init__(self, x_NI: Tensor, y_NO: Tensor, rows: Grouping, *, like: Tensor) -> None:
        self._x, self._y, self._y_apart = x_NI, y_NO, y_NO
        self._x_apart = x_NI
        if like.dtype != x_NI.dtype:
            self._x_apart = x_NI.new_empty(x_NI.shape, dtype=like.dtype)
            # Rows of the base are never written.
            self._y_apart = y_NO.new_zeros(y_NO.shape, dtype=like.dtype)
        narrow_NR = like.new_empty(len(x_NI), like.shape[2])
        self._shrink = Product(self._x_apart, narrow_NR, rows)
        self._expand = Product(narrow_NR, self._y_apart, rows)

    def add(self, shrink_MIR: Tensor, expand_MRO: Tensor) -> None:
        """Compute it."""
        if self._x_apart is self._x:
            self._shrink.write(shrink_MIR)
            self._expand.add(expand_MRO)
            return
        self._x_apart.copy_(self._x)
        self._shrink.write(shrink_MIR)
        self._expand.write(expand_MRO)
        self._y += self._y_apart


def _without_base(runs: tuple[Run, ...]) -> tuple[Run, ...]:
    """Return the runs of all members but the first."""
    if not runs or runs[0].first_member > 0:
        return runs
    first, *rest = runs
    own_row = first.first_row + first.rows_per_member
    own = Run(1, first.num_members - 1, own_row, first.rows_per_member)
    return (own, *rest) if own.num_members else tuple(rest)


def _widened(x_nI: Tensor, matrix_IO: Tensor) -> Tensor:
    """Multiply in bfloat16, several rows in float32, a part of the matrix at a time."""
    if len(x_nI) <= _MOST_BFLOAT16_ROWS:
        return x_nI @ matrix_IO
    x_nI = x_nI.float()
    parts = torch.split(matrix_IO, _CACHED_OUTPUTS, dim=1)
    return torch.cat([x_nI @ part.float() for part in parts], 1)


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
        self.rotated_NHd = self.heads_NHd[:, :, : architecture.rotated_dims]
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
