"""Which number types a device multiplies fast."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch

Precision: TypeAlias = Literal["auto", "bfloat16", "float32"]


def fast_bfloat16(device: torch.device) -> bool:
    """Whether products in bfloat16 are faster there than in float32.

    A CPU without instructions for it computes them many times more slowly.
    """
    return device.type != "cpu" or bool(
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def products_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The type that matrix products are computed in on a device; "auto": what is faster there."""
    low = precision == "bfloat16" or (precision == "auto" and fast_bfloat16(device))
    return torch.bfloat16 if low else torch.float32
