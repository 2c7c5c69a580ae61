"""Three operations that have a faster form on CPU, where they are launched one by one.

Where they are compiled, or on a GPU, each is what its name says and nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from vllm import _custom_ops as ops
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.layernorm import RMSNorm

# From so many tokens on, a product is faster with its weights on the left.
_SEVERAL_TOKENS = 8


def by_columns(weight_MIO: Tensor) -> Tensor:
    """Return `weight` as `wide` wants it: on CPU with each column's numbers side by side."""
    return weight_MIO.mT.contiguous().mT if _by_mkl(weight_MIO) else weight_MIO


def wide(x_MTI: Tensor, weight_MIO: Tensor) -> Tensor:
    """Return x·W of a weight that is wider than long, and `by_columns` unless it is compiled.

    MKL reads such a weight row by row at half the speed as soon as there are two tokens. Column by
    column, two take four tenths less time, 8 and 32 three; one alone takes half more.
    """
    if _launched(x_MTI) and _by_mkl(x_MTI) and x_MTI.shape[1] >= _SEVERAL_TOKENS:
        return torch.bmm(weight_MIO.mT, x_MTI.mT).mT
    return torch.bmm(x_MTI, weight_MIO)


def normed(norm: RMSNorm, x: Tensor) -> Tensor:
    """Return `x`, each row scaled to a root mean square of one."""
    if not _launched(x):
        scaled: Tensor = norm(x)
        return scaled
    out = torch.empty_like(x)
    ops.rms_norm(out, x, None, norm.variance_epsilon)
    return out


def gated(activate: SiluAndMul, gate_up_MTF: Tensor) -> Tensor:
    """Return silu(gate)·up of the two halves; the halves are lost."""
    if not _launched(gate_up_MTF):
        product: Tensor = activate(gate_up_MTF)
        return product
    gate, up = gate_up_MTF.chunk(2, dim=-1)
    return functional.silu(gate, inplace=True).mul_(up)


def _by_mkl(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32


def _launched(x: Tensor) -> bool:
    return x.is_cpu and not torch.compiler.is_compiling()
