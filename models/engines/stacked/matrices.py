"""The members' matrices: as numbers, in an order that one kernel multiplies fast, or as integers.

Shapes: M members, I inputs, O outputs, n or N rows. Decoding reads every weight for every token,
so that its speed on CPU is that of reading, as long as a kernel takes several rows for the price of
one: oneDNN's does with matrices in its own order (for 8 rows 2 to 4 times as fast as a plain
product on two cores without AVX-512). Integers of 8 bits take a quarter of float32's bytes, those
of 4 bits a seventh. They are made from the checkpoint's numbers when it is loaded, by rounding to
the nearest: int8 with one scale per output (as LLM.int8() has for weights, Dettmers et al. 2022,
section 2.1), int4 with a scale and an offset for every 32 inputs of an output. Torch's kernels
multiply them with rows in bfloat16; where the processor multiplies integers of 8 bits itself
(VNNI), rows are rounded to such, too, which is faster with large matrices. Everything between the
products stays as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from models.engines.stacked.architecture import HEAD
from models.errors import PoolError
from models.precision import fast_bfloat16, products_dtype

# More rows than these are multiplied with the integers written out in a type that the device
# multiplies fast: that costs about as much, and tells them all exactly.
_MOST_ROWS = 16
# Smaller matrices cost more by rounding their rows than that saves.
_LEAST_ROUNDED = 2**20
# Up to this a call of oneDNN's kernel saves nothing, and costs twice as much once several engines
# of one process have computed with several threads, whose helpers then sleep between operations.
_MOST_AS_THEY_ARE = 2**18
_GROUP_INPUTS, _STEP_OUTPUTS = 32, 16
_MOST_INT8, _MOST_INT4 = 127, 15
_LEAST_SCALE = 1e-30


class Packed(Protocol):
    """The matrices of all members for one kernel."""

    def member(self, member: int) -> Tensor:
        """Return one as numbers, [I, O], float32."""
        ...

    def times(self, x_nI: Tensor, member: int) -> Tensor:
        """Return rows times one, [n, O]."""
        ...


class Reordered:
    """Numbers in the order of oneDNN's kernel, which alone can read it."""

    def __init__(self, matrices_MIO: Tensor) -> None:
        """Reorder matrices on CPU, in float32 or bfloat16."""
        self._matrices = [
            torch.ops.mkldnn._reorder_linear_weight(matrix_IO.T.contiguous())
            for matrix_IO in matrices_MIO
        ]

    def member(self, member: int) -> Tensor:
        """See `Packed`."""
        matrix_OI: Tensor = self._matrices[member].to_dense()
        return matrix_OI.T

    def times(self, x_nI: Tensor, member: int) -> Tensor:
        """See `Packed`."""
        product: Tensor = torch.ops.mkldnn._linear_pointwise(
            x_nI, self._matrices[member], None, "none", [], ""
        )
        return product


class Int8:
    """Integers of 8 bits with a scale per output."""

    def __init__(self, matrices_MIO: Tensor) -> None:
        """Round matrices; on CUDA one, as torch's kernel there wants all rows of one matrix."""
        assert len(matrices_MIO) == 1 or not matrices_MIO.is_cuda
        self._values_MOI, self._scales_MO = _round_int8(matrices_MIO)

    def member(self, member: int) -> Tensor:
        """See `Packed`."""
        return (self._values_MOI[member] * self._scales_MO[member].float()[:, None]).T

    def times(self, x_nI: Tensor, member: int) -> Tensor:
        """See `Packed`."""
        values_OI, scales_O = self._values_MOI[member], self._scales_MO[member]
        if len(x_nI) <= _MOST_ROWS:
            return torch._weight_int8pack_mm(x_nI.bfloat16(), values_OI, scales_O)
        dtype = products_dtype("auto", x_nI.device)
        return (x_nI.to(dtype) @ values_OI.T.to(dtype)).float() * scales_O.float()

    def outputs(self, members_N: Tensor, outputs_N: Tensor) -> Tensor:
        """Return the weights of single outputs, [N, I], float32: rows of a tied embedding."""
        scales_N1 = self._scales_MO[members_N, outputs_N].float()[:, None]
        return self._values_MOI[members_N, outputs_N] * scales_N1


class Int8Rows:
    """The same, times rows that are rounded to 8 bits, too, in two parts: what rounding left of a
    row is another row. One part alone loses more than it is worth (SmolLM2: 1.6% of its loss).

    FBGEMM's kernel takes one scale for all rows, from the least and the largest number. So each row
    is brought to -127 to 127 first, and gets the ends of a range of steps of one, which meet
    weights of zero: every row is rounded as it would be alone.
    """

    def __init__(self, matrices_MIO: Tensor) -> None:
        """Round and pack matrices on CPU."""
        values_MOI, scales_MO = _round_int8(matrices_MIO)
        self._num_inputs = values_MOI.shape[2]
        self._packed = [
            torch.ops.quantized.linear_prepack(_quantized(F.pad(values_OI, (0, 2)), scales_O), None)
            for values_OI, scales_O in zip(values_MOI, scales_MO, strict=True)
        ]
        self._make_room(1)

    def member(self, member: int) -> Tensor:
        """See `Packed`."""
        matrix_OI: Tensor = torch.ops.quantized.linear_unpack(self._packed[member])[0].dequantize()
        return matrix_OI[:, :-2].T

    def times(self, x_nI: Tensor, member: int) -> Tensor:
        """See `Packed`."""
        num_rows = len(x_nI)
        if num_rows != len(self._whole_nI):
            self._make_room(num_rows)
        step_n1 = torch.linalg.vector_norm(x_nI.float(), torch.inf, 1, keepdim=True)
        step_n1.clamp_min_(_LEAST_SCALE).div_(_MOST_INT8)
        exact_nI = x_nI / step_n1
        torch.round(exact_nI, out=self._whole_nI)
        torch.sub(exact_nI, self._whole_nI, out=self._rest_nI).mul_(2 * _MOST_INT8)
        parts_NO = torch.ops.quantized.linear_dynamic(self._rows_NI, self._packed[member], False)
        product_nO = torch.add(parts_NO[:num_rows], parts_NO[num_rows:], alpha=0.5 / _MOST_INT8)
        return product_nO.mul_(step_n1)

    def _make_room(self, num_rows: int) -> None:
        """Make what rows are written into, in two parts, with the ends of their range."""
        self._rows_NI = torch.empty(2 * num_rows, self._num_inputs + 2)
        self._rows_NI[:, self._num_inputs :] = torch.tensor([_MOST_INT8 + 1.0, -_MOST_INT8])
        self._whole_nI, self._rest_nI = self._rows_NI[:, : self._num_inputs].chunk(2)


class Int8Head(Int8Rows):
    """A head whose outputs are also read one by one, as a tied embedding's are."""

    def __init__(self, matrices_MIO: Tensor) -> None:
        """Keep them twice: as they are read, and as they are multiplied."""
        super().__init__(matrices_MIO)
        self.outputs = Int8(matrices_MIO).outputs


class Int4:
    """Integers of 4 bits with a scale and an offset per output and group of inputs.

    Torch's kernel reads an integer n as (n - 8) · scale + zero.
    """

    def __init__(self, matrices_MIO: Tensor) -> None:
        """Round float32 matrices, whose inputs and outputs the kernel can group."""
        self._num_inputs = matrices_MIO.shape[1]
        rounded = [_round_int4(matrix_IO) for matrix_IO in matrices_MIO]
        self._packed = [packed for packed, _ in rounded]
        self._scales_and_zeros = [scales_GO2 for _, scales_GO2 in rounded]

    def member(self, member: int) -> Tensor:
        """See `Packed`."""
        # Only the kernel knows how it packs: rows of the identity read a matrix out.
        return self.times(torch.eye(self._num_inputs, dtype=torch.bfloat16), member).float()

    def times(self, x_nI: Tensor, member: int) -> Tensor:
        """See `Packed`."""
        if len(x_nI) > self._num_inputs:  # more than it takes to read the matrix out
            return x_nI @ self.member(member).to(x_nI.dtype)
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x_nI.bfloat16(), self._packed[member], _GROUP_INPUTS, self._scales_and_zeros[member]
        )
        return product


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """One matrix for all members, to which each adds a product of two narrow ones (LoRA).

    The first member is the base itself; ranks are padded with zeros to the largest, R. None: no
    member adds anything.
    """

    base: Tensor | Packed  # [1, I, O]
    factors: tuple[Tensor, Tensor] | None  # [M, I, R], [M, R, O]

    def outputs(self, _members_N: Tensor, outputs_N: Tensor) -> Tensor:
        """Return the weights of single outputs of the base, as `Int8.outputs` does."""
        assert isinstance(self.base, Int8 | Int8Head), "other matrices are indexed"
        return self.base.outputs(torch.zeros_like(outputs_N), outputs_N)


Matrices: TypeAlias = Tensor | Packed | Adapted
"""[M, I, O]."""
MatricesT = TypeVar("MatricesT", bound=Matrices)
Pack: TypeAlias = Callable[[str, Tensor], MatricesT]
"""Keeps the matrices [M, I, O] of a name for products with them."""


def fastest(
    device: torch.device, dtype: torch.dtype, *, several_rows: bool = False
) -> Pack[Tensor | Reordered]:
    """Return how matrices of a type are kept where the device is to multiply them fast.

    With `several_rows` mostly several of a member come at once, as drafts make them.
    """
    if device.type != "cpu":
        return as_they_are
    if dtype == torch.bfloat16:
        return reordered if torch._C._has_mkldnn and fast_bfloat16(device) else outputs_first
    if not torch._C._has_mkldnn:
        return as_they_are
    return reordered if several_rows else reordered_alone


def as_they_are(_name: str, matrices_MIO: Tensor) -> Tensor:
    """Keep numbers in the order in which a plain product in float32 is fastest, and any on CUDA."""
    return matrices_MIO


def reordered(name: str, matrices_MIO: Tensor) -> Tensor | Reordered:
    """Keep numbers in oneDNN's order on CPU, small matrices in that of plain products."""
    if matrices_MIO[0].numel() > _MOST_AS_THEY_ARE:
        return Reordered(matrices_MIO)
    small = outputs_first if matrices_MIO.dtype == torch.bfloat16 else as_they_are
    return small(name, matrices_MIO)


def reordered_alone(name: str, matrices_MIO: Tensor) -> Tensor | Reordered:
    """Keep one member's like that; in float32 a row of each of several is fastest in one batched
    product."""
    return reordered(name, matrices_MIO) if len(matrices_MIO) == 1 else matrices_MIO


def outputs_first(_name: str, matrices_MIO: Tensor) -> Tensor:
    """Keep numbers in the order in which bfloat16 multiplies fastest on CPU, by far."""
    return matrices_MIO.transpose(1, 2).contiguous().transpose(1, 2)


def as_int8(name: str, matrices_MIO: Tensor) -> Int8 | Int8Rows:
    """Round to integers of 8 bits, and have them multiplied as the device does it fastest."""
    rounds_rows = torch.cpu._is_vnni_supported() and hasattr(torch.ops.quantized, "linear_prepack")
    if matrices_MIO.is_cuda or not rounds_rows:
        return Int8(matrices_MIO)
    if name == HEAD:
        return Int8Head(matrices_MIO)
    small = fast_bfloat16(matrices_MIO.device) and matrices_MIO[0].numel() < _LEAST_ROUNDED
    return Int8(matrices_MIO) if small else Int8Rows(matrices_MIO)


def as_int4(name: str, matrices_MIO: Tensor) -> Int4 | Int8 | Int8Rows:
    """Round to integers of 4 bits, but a head, which most depends on each, to 8.

    `PoolError` for what the kernel cannot group.
    """
    _, num_inputs, num_outputs = matrices_MIO.shape
    if name == HEAD:
        return as_int8(name, matrices_MIO)
    if num_inputs % _GROUP_INPUTS or num_outputs % _STEP_OUTPUTS:
        raise PoolError(
            f"dtype: int4 needs inputs that are a multiple of {_GROUP_INPUTS} and outputs that are "
            f"one of {_STEP_OUTPUTS}; {name} has {num_inputs} and {num_outputs}; use int8"
        )
    return Int4(matrices_MIO)


def _round_int8(matrices_MIO: Tensor) -> tuple[Tensor, Tensor]:
    """Return integers, [M, O, I], and their outputs' scales, [M, O], bfloat16."""
    matrices_MOI = matrices_MIO.transpose(1, 2).float()
    largest_MO = matrices_MOI.abs().amax(2)
    scales_MO = (largest_MO / _MOST_INT8).clamp_min(_LEAST_SCALE).bfloat16()
    steps_MOI = (matrices_MOI / scales_MO.float()[:, :, None]).round()
    return steps_MOI.clamp(-_MOST_INT8, _MOST_INT8).to(torch.int8).contiguous(), scales_MO


def _quantized(values_OI: Tensor, scales_O: Tensor) -> Tensor:
    """Return integers as a tensor that knows its scales, as FBGEMM wants them.

    Torch warns that such tensors will go in some release after this one, which is pinned; `as_int8`
    does without where they have gone.
    """
    zeros_O = torch.zeros(len(scales_O), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")
        return torch._make_per_channel_quantized_tensor(values_OI, scales_O.double(), zeros_O, 0)


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
