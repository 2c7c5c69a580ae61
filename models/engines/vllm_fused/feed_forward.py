"""The gated feed-forward of all members; shapes as in `model`.

On a GPU it is two batched products. On CPU the members are the experts of vLLM's mixture of
experts, each with its own tokens: their weights are packed once, where a batched product packs them
anew at every step, and what lies between the two products stays in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm import _custom_ops as ops
from vllm.model_executor.layers.activation import SiluAndMul

# vLLM's kernels on CPU compute so many columns at a time.
_COLUMNS = 32


class FeedForward(nn.Module):
    """down(silu(x·gate) · (x·up)) of every member."""

    def __init__(self) -> None:
        super().__init__()
        self.activate = SiluAndMul()

    def take(self, gate_up_MDF: Tensor, down_MFD: Tensor) -> None:
        """Take the weights of this rank's members; gate and up side by side are [M, D, 2F]."""
        self._kernel = _kernel_for(down_MFD)
        if self._kernel is not None:
            gate_up_MDF, down_MFD = (
                ops.cpu_prepack_moe_weight(weight.mT.contiguous(), self._kernel)
                for weight in _padded(gate_up_MDF, down_MFD)
            )
        self.gate_up = nn.Parameter(gate_up_MDF, requires_grad=False)
        self.down = nn.Parameter(down_MFD, requires_grad=False)

    def forward(self, x_MTD: Tensor) -> Tensor:
        """Return what is to be added to the residual, [M, T, D]."""
        if self._kernel is None:
            product: Tensor = torch.bmm(self.activate(torch.bmm(x_MTD, self.gate_up)), self.down)
            return product
        num_members, num_tokens, _ = x_MTD.shape
        x_ND = x_MTD.flatten(0, 1)
        out_ND = torch.empty_like(x_ND)
        member_of_M1 = torch.arange(num_members, dtype=torch.int32)[:, None]
        ops.cpu_fused_moe(
            out_ND,
            x_ND,
            self.gate_up,
            self.down,
            None,
            None,
            torch.ones(len(x_ND), 1),
            member_of_M1.expand(-1, num_tokens).reshape(-1, 1),
            "silu",
            self._kernel,
        )
        return out_ND.view_as(x_MTD)


def _padded(gate_up_MDF: Tensor, down_MFD: Tensor) -> tuple[Tensor, Tensor]:
    """Return both with zeros up to the next number of inner columns that the kernels take."""
    missing = -down_MFD.shape[1] % _COLUMNS
    halves = (functional.pad(half, (0, missing)) for half in gate_up_MDF.chunk(2, dim=-1))
    return torch.cat(tuple(halves), dim=-1), functional.pad(down_MFD, (0, 0, 0, missing))


def _kernel_for(down_MFD: Tensor) -> str | None:
    """Return the name of vLLM's kernel for such weights on this CPU, None if it has none."""
    if not (
        down_MFD.is_cpu
        and hasattr(torch.ops._C, "cpu_fused_moe")
        and down_MFD.shape[-1] % _COLUMNS == 0
    ):
        return None
    has_tiles = down_MFD.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    return "amx" if has_tiles else "vec"
