"""The key/value cache: one arena of rows, from which each request takes one contiguous region.

A row holds the keys and values of one token of one lane in one layer. A request with k lanes gets
k times its capacity in rows when it is admitted and gives them back when it ends, so that nothing
runs out of memory on the way, and its lanes' keys are plain views.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.card import Shape


class Arena:
    """Rows of keys and values for every layer: `layers[i]` is [rows + 1, 2·K·d], keys first.

    The last is nobody's: padding writes to it.
    """

    def __init__(
        self, shape: Shape, memory_bytes: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        width = 2 * shape.num_kv_heads * shape.head_dim
        self.row_bytes = shape.num_layers * width * dtype.itemsize
        self.num_rows = memory_bytes // self.row_bytes
        self.layers: tuple[Tensor, ...] = torch.empty(
            (shape.num_layers, self.num_rows + 1, width), device=device, dtype=dtype
        ).unbind(0)
        self.scratch_row = self.num_rows
        self._free: list[tuple[int, int]] = [(0, self.num_rows)]  # (start, length), sorted
        self.num_rows_used = 0

    def allocate(self, num_rows: int) -> int | None:
        """Take the first free region of `num_rows` rows and return its start; None: no room."""
        for i, (start, length) in enumerate(self._free):
            if length >= num_rows:
                rest = (start + num_rows, length - num_rows)
                self._free[i : i + 1] = [rest] if rest[1] else []
                self.num_rows_used += num_rows
                return start
        return None

    def release(self, start: int, num_rows: int) -> None:
        """Give a region back."""
        merged: list[tuple[int, int]] = []
        for region in sorted([*self._free, (start, num_rows)]):
            if merged and sum(merged[-1]) == region[0]:
                merged[-1] = (merged[-1][0], merged[-1][1] + region[1])
            else:
                merged.append(region)
        self._free = merged
        self.num_rows_used -= num_rows
