"""The members' matrices, as numbers or as small integers, and products with them.

Shapes: M members, I inputs, O outputs, n or N rows. Decoding reads every weight for every token,
so that its speed on CPU is that of reading: integers of 8 bits take a quarter of float32's bytes,
those of 4 bits a seventh. They are made from the checkpoint's numbers when it is loaded, by
rounding to the nearest: int8 with one scale per output (as LLM.int8() has for weights, Dettmers et
al. 2022, section 2.1), int4 with a scale and an offset for every 32 inputs of an output. Torch's
kernels multiply them with rows in bfloat16; everything between the products stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from models.engines.stacked.architecture import HEAD
from models.engines.stacked.layout import Grouping, Run
from models.errors import PoolError

# More rows than these are multiplied in float32: writing a matrix out costs about as much.
_MOST_ROWS = 64
# Where the processor has no instructions for bfloat16, each row costs as much as the first: more
# than these are faster in float32, where so many outputs at once stay in the processor's cache.
_MOST_BFLOAT16_ROWS, _CACHED_OUTPUTS = 4, 192
_GROUP_INPUTS, _STEP_OUTPUTS = 32, 16
_MOST_INT8, _MOST_INT4 = 127, 15
_LEAST_SCALE = 1e-30
_BFLOAT16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Integers(Protocol):
    """The matrices of all members as integers; more rows than `most_rows` want numbers."""

    most_rows: int

    def member(self, member: int) -> Tensor:
        """Return one as numbers, [I, O], float32."""
        ...

    def times(self, x_nI: Tensor, member: int) -> Tensor:
        """Return bfloat16 rows times one, [n, O]."""
        ...


class Int8:
    """Integers of 8 bits with a scale per output."""

    def __init__(self, matrices_MIO: Tensor) -> None:
        """Round float32 matrices."""
        self.most_rows = _MOST_ROWS
        matrices_MOI = matrices_MIO.transpose(1, 2)
        largest_MO = matrices_MOI.abs().amax(2)
        self._scales_MO = (largest_MO / _MOST_INT8).clamp_min(_LEAST_SCALE).bfloat16()
        steps_MOI = (matrices_MOI / self._scales_MO.float()[:, :, None]).round()
        self._values_MOI = steps_MOI.clamp(-_MOST_INT8, _MOST_INT8).to(torch.int8).contiguous()

    def member(self, member: int) -> Tensor:
        """See `Integers`."""
        return (self._values_MOI[member] * self._scales_MO[member].float()[:, None]).T

    def times(self, x_nI: Tensor, member: int) -> Tensor:
        """See `Integers`."""
        return torch._weight_int8pack_mm(x_nI, self._values_MOI[member], self._scales_MO[member])

    def outputs(self, members_N: Tensor, outputs_N: Tensor) -> Tensor:
        """Return the weights of single outputs, [N, I], float32: rows of a tied embedding."""
        scales_N1 = self._scales_MO[members_N, outputs_N].float()[:, None]
        return self._values_MOI[members_N, outputs_N] * scales_N1


class Int4:
    """Integers of 4 bits with a scale and an offset per output and group of inputs.

    Torch's kernel reads an integer n as (n - 8) · scale + zero.
    """

    def __init__(self, matrices_MIO: Tensor) -> None:
        """Round float32 matrices, whose inputs and outputs the kernel can group."""
        self.most_rows = matrices_MIO.shape[1]  # as many as `member` multiplies
        rounded = [_round_int4(matrix_IO) for matrix_IO in matrices_MIO]
        self._packed = [packed for packed, _ in rounded]
        self._scales_and_zeros = [scales_GO2 for _, scales_GO2 in rounded]

    def member(self, member: int) -> Tensor:
        """See `Integers`."""
        num_inputs = len(self._scales_and_zeros[member]) * _GROUP_INPUTS
        # Only the kernel knows how it packs: rows of the identity read a matrix out.
        return self.times(torch.eye(num_inputs, dtype=torch.bfloat16), member).float()

    def times(self, x_nI: Tensor, member: int) -> Tensor:
        """See `Integers`."""
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_nI, self._packed[member], _GROUP_INPUTS, self._scales_and_zeros[member]
        )
        return product


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """One matrix for all members, to which each adds a product of two narrow ones (LoRA).

    The first member is the base itself; ranks are padded with zeros to the largest, R. None: no
    member adds anything.
    """

    base: Tensor | Integers  # [1, I, O]
    factors: tuple[Tensor, Tensor] | None  # [M, I, R], [M, R, O]

    def outputs(self, _members_N: Tensor, outputs_N: Tensor) -> Tensor:
        """Return the weights of single outputs of the base, as `Int8.outputs` does."""
        assert isinstance(self.base, Int8), "other matrices are indexed"
        return self.base.outputs(torch.zeros_like(outputs_N), outputs_N)


Matrices: TypeAlias = Tensor | Integers | Adapted
"""[M, I, O]."""
MatricesT = TypeVar("MatricesT", bound=Matrices)
Pack: TypeAlias = Callable[[str, Tensor], MatricesT]
"""Keeps the matrices [M, I, O] of a name for products with them."""


def as_they_are(_name: str, matrices_MIO: Tensor) -> Tensor:
    """Keep numbers in the order in which float32 multiplies fastest, and every type on CUDA."""
    return matrices_MIO


def outputs_first(_name: str, matrices_MIO: Tensor) -> Tensor:
    """Keep numbers in the order in which bfloat16 multiplies fastest on CPU, by far."""
    return matrices_MIO.transpose(1, 2).contiguous().transpose(1, 2)


def as_int8(_name: str, matrices_MIO: Tensor) -> Int8:
    """Round to integers of 8 bits."""
    return Int8(matrices_MIO)


def as_int4(name: str, matrices_MIO: Tensor) -> Int4 | Int8:
    """Round to integers of 4 bits, but a head, which most depends on each, to 8.

    `PoolError` for what the kernel cannot group.
    """
    _, num_inputs, num_outputs = matrices_MIO.shape
    if name == HEAD:
        return Int8(matrices_MIO)
    if num_inputs % _GROUP_INPUTS or num_outputs % _STEP_OUTPUTS:
        raise PoolError(
            f"dtype: int4 needs inputs that are a multiple of {_GROUP_INPUTS} and outputs that are "
            f"one of {_STEP_OUTPUTS}; {name} has {num_inputs} and {num_outputs}; use int8"
        )
    return Int4(matrices_MIO)


class Product:
    """Each row of `x` times its member's matrix, into `y` or onto it.

    On CPU one batched product per run of members with equally many rows, or a plain one for a run
    of one (a third faster); on CUDA one grouped product, which takes rows as they come.
    """

    def __init__(self, x_NI: Tensor, y_NO: Tensor, rows: Grouping) -> None:
        self._grouped = x_NI.is_cuda or not rows.runs
        # Without instructions for it the processor is many times faster in float32.
        self._widens = x_NI.dtype == torch.bfloat16 and x_NI.device.type == "cpu" and not _BFLOAT16
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
                y.copy_(_times(x, weight_MIO, member))
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
                y.add_(_times(x, weight_MIO, member))
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


def _times(x_nI: Tensor, matrices: Integers, member: int) -> Tensor:
    if len(x_nI) > matrices.most_rows:
        return x_nI @ matrices.member(member)
    return matrices.times(x_nI.bfloat16(), member)


def _round_int4(matrix_IO: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers as the kernel packs them, and their groups' scales and zeros, [G, O, 2]."""
    num_inputs, num_outputs = matrix_IO.shape
    groups_OGi = matrix_IO.T.reshape(num_outputs, num_inputs // _GROUP_INPUTS, _GROUP_INPUTS)
    low_OG1, high_OG1 = groups_OGi.amin(-1, keepdim=True), groups_OGi.amax(-1, keepdim=True)
    scale_OG1 = ((high_OG1 - low_OG1) / _MOST_INT4).clamp_min(_LEAST_SCALE).bfloat16()
    zero_OG1 = (low_OG1 + 8 * scale_OG1.float()).bfloat16()
    steps_OGi = ((groups_OGi - zero_OG1.float()) / scale_OG1.float() + 8).round()
    numbers_OI = steps_OGi.clamp(0, _MOST_INT4).to(torch.int32).flatten(1)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers_OI, 1)
    return packed, torch.cat([scale_OG1, zero_OG1], -1).transpose(0, 1).contiguous()
