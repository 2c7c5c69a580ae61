"""How a step's requests attend to the key/value cache: one by one, or the decoding ones together.

Shapes: n rows of one path, L lanes that decode, W cached tokens, K key/value heads, G queries per
key/value head, d head size, Q = K·G·d, T tokens of one request in this step.

Reading requests one by one (`Span`) costs an attention call each, over plain views of the cache;
reading them together (`Padded`) costs a copy, padded to the longest. Each path has two halves: the
indices, which `layout` makes and which move on while the same requests decode, and the computation
over the buffers that it is bound to. A recorded graph (`graphs`) has a `Padded` of its own, into
which each step's is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor

from models.card import Shape
from models.engines.stacked.architecture import Architecture

# On CPU a call is worth about this many bytes of copying; on CUDA all are read together, as calls
# cannot be recorded whose shapes grow (see `graphs`), up to so many bytes a layer.
_BYTES_PER_CALL = 128 * 1024
_MOST_CUDA_BYTES = 256 * 2**20
_WIDTH_STEP_TOKENS = 32


@dataclass(slots=True)
class Span:
    """One request by itself: its rows in request-major order, and where its cached tokens are."""

    rows: slice
    num_lanes: int
    num_tokens: int
    cache_row: int
    capacity_tokens: int
    num_cached: int  # tokens, with those of this step

    def advance(self) -> bool:
        """Move on by one token."""
        self.num_cached += 1
        return True


@dataclass(slots=True)
class Padded:
    """Decoding lanes together: their cache rows padded to one width, and a mask over them.

    A lane's padding repeats its newest row (never an unwritten one); `mask_LW` is 0 or -inf.
    `newest_L` is the column of each lane's newest row, and `newest_rows_L` that row in the cache.
    """

    rows: slice
    cache_rows_LW: Tensor
    mask_LW: Tensor
    newest_L: Tensor
    newest_rows_L: Tensor
    num_cached: int  # of the longest

    @classmethod
    def empty(cls, num_lanes: int, width: int, device: torch.device) -> Padded:
        """Return one of fixed shapes, to be loaded."""

        def indices(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        return cls(
            rows=slice(0, num_lanes),
            cache_rows_LW=indices(num_lanes, width),
            mask_LW=torch.zeros(num_lanes, width, device=device),
            newest_L=indices(num_lanes),
            newest_rows_L=indices(num_lanes),
            num_cached=0,
        )

    @property
    def width(self) -> int:
        """How many cached tokens a lane has room for."""
        return self.mask_LW.shape[1]

    def advance(self) -> bool:
        """Let every lane see one more row, the one after its newest; False where none fits."""
        if self.num_cached == self.width:
            return False
        self.newest_L += 1
        self.newest_rows_L += 1
        self.num_cached += 1
        newest_L1 = self.newest_L[:, None]
        self.cache_rows_LW.scatter_(1, newest_L1, self.newest_rows_L[:, None])
        self.mask_LW.scatter_(1, newest_L1, 0.0)
        return True

    def load(self, other: Padded, scratch_row: int) -> None:
        """Become `other`, which has no more lanes and columns; what is left reads `scratch_row`."""
        num_lanes, width = other.mask_LW.shape
        self.cache_rows_LW.fill_(scratch_row)
        self.cache_rows_LW[:num_lanes, :width].copy_(other.cache_rows_LW)
        self.newest_L[:num_lanes].copy_(other.newest_L)
        self.newest_L[num_lanes:].fill_(0)
        # Nobody sees the padding but lanes of padding, which must see something.
        self.mask_LW.fill_(float("-inf"))
        self.mask_LW[num_lanes:, 0].fill_(0.0)
        self.mask_LW[:num_lanes, :width].copy_(other.mask_LW)


Path: TypeAlias = Span | Padded


def choose_paths(spans: Seq[Span], row_bytes: int, device: torch.device) -> tuple[Path, ...]:
    """Say how the requests attend: the decoding ones, which come first, together or each by itself.

    `row_bytes` is a cache row's, in one layer.
    """
    decoding = [span for span in spans if span.num_tokens == 1]
    width = max((span.num_cached for span in decoding), default=0)
    width += -width % _WIDTH_STEP_TOKENS
    num_bytes = sum(span.num_lanes for span in decoding) * width * row_bytes
    if device.type == "cuda":
        together = 0 < num_bytes <= _MOST_CUDA_BYTES
    else:
        together = len(decoding) > 1 and num_bytes < len(decoding) * _BYTES_PER_CALL
    if not together:
        return tuple(spans)
    return (_pad(decoding, width, device), *spans[len(decoding) :])


def _pad(spans: Seq[Span], width: int, device: torch.device) -> Padded:
    first_rows = np.concatenate(
        [span.cache_row + np.arange(span.num_lanes) * span.capacity_tokens for span in spans]
    )
    newest = np.repeat([span.num_cached - 1 for span in spans], [span.num_lanes for span in spans])[
        :, None
    ]
    columns = np.arange(width)
    rows, mask = first_rows[:, None] + np.minimum(columns, newest), columns <= newest
    return Padded(
        rows=slice(0, len(first_rows)),
        cache_rows_LW=torch.from_numpy(rows).to(device),
        mask_LW=torch.from_numpy(np.where(mask, 0, -np.inf).astype(np.float32)).to(device),
        newest_L=torch.from_numpy(newest[:, 0]).to(device),
        newest_rows_L=torch.from_numpy(first_rows + newest[:, 0]).to(device),
        num_cached=int(newest.max()) + 1,
    )


class SpanAttention:
    """Attends within one request; its keys and values are views of the cache.

    A chunk of a prompt is masked where causality is not enough; a decoding token's window is a
    shorter view.
    """

    def __init__(
        self, span: Span, architecture: Architecture, query_nQ: Tensor, output_nQ: Tensor
    ) -> None:
        """Bind to the rows of queries to read and of outputs to write."""
        self._span, self._shape = span, architecture.shape
        self._windows = [layer.window_tokens for layer in architecture.layers]
        self._seen: dict[int | None, int] = {}  # tokens, by window
        self._decodes = span.num_tokens == 1
        if self._decodes:
            self._query, self._output = (_grouped(x, self._shape) for x in (query_nQ, output_nQ))
            self._masks = dict.fromkeys(self._windows)
        else:
            split = (span.num_lanes, span.num_tokens, -1, self._shape.head_dim)
            self._query, self._output = (
                x.view(split).transpose(1, 2) for x in (query_nQ, output_nQ)
            )
            self._masks = {
                window: _chunk_mask(span, window, query_nQ.device) for window in {*self._windows}
            }

    def begin(self) -> None:
        """Prepare for a step's layers."""
        num_cached = self._span.num_cached
        for window in self._masks:
            most = num_cached if window is None or not self._decodes else window
            self._seen[window] = min(num_cached, most)

    def attend(self, layer: int, cache: Tensor) -> None:
        """Attend in `layer`, whose rows of keys and values `cache` holds."""
        span, row_size, head_dim = self._span, cache.shape[1], self._shape.head_dim
        window = self._windows[layer]
        mask, num_seen = self._masks[window], self._seen[window]
        shape = (span.num_lanes, self._shape.num_kv_heads, num_seen, head_dim)
        strides = (span.capacity_tokens * row_size, head_dim, row_size, 1)
        first_row = span.cache_row + span.num_cached - num_seen
        first = cache.storage_offset() + first_row * row_size
        output = F.scaled_dot_product_attention(
            self._query,
            cache.as_strided(shape, strides, first),
            cache.as_strided(shape, strides, first + row_size // 2),
            attn_mask=mask,
            is_causal=not self._decodes and mask is None,
            enable_gqa=not self._decodes,
        )
        self._output.copy_(output)


def _chunk_mask(span: Span, window_tokens: int | None, device: torch.device) -> Tensor | None:
    """Return which cached tokens each token of a chunk sees, [T, cached]; None: causality says."""
    narrow = window_tokens is not None and window_tokens < span.num_cached
    if span.num_cached == span.num_tokens and not narrow:
        return None
    earlier = span.num_cached - span.num_tokens
    mask = torch.ones(span.num_tokens, span.num_cached, dtype=torch.bool, device=device)
    mask.tril_(earlier)
    return mask.triu_(earlier - window_tokens + 1) if window_tokens is not None else mask


class PaddedAttention:
    """Attends from all decoding lanes at once, over copies of their cache rows.

    A layer may keep its copy while the layout stays: then a step adds only the rows that it has
    written. Otherwise all layers share one.
    """

    def __init__(
        self,
        padded: Padded,
        architecture: Architecture,
        query_LQ: Tensor,
        output_LQ: Tensor,
        *,
        keeps_copies: bool,
    ) -> None:
        """Bind to the rows of queries to read and of outputs to write."""
        shape, num_lanes = architecture.shape, len(query_LQ)
        self._padded, self._keeps_copies = padded, keeps_copies
        self._query, self._output = _grouped(query_LQ, shape), _grouped(output_LQ, shape)
        self._windows = [layer.window_tokens for layer in architecture.layers]
        self._masks: dict[int | None, Tensor] = {}
        self._columns_W = torch.arange(padded.width, device=query_LQ.device)
        self._starts_L = torch.arange(num_lanes, device=query_LQ.device) * padded.width
        self._newest_L = torch.empty_like(self._starts_L)  # among all lanes' copied rows
        copies = [
            _Copy(query_LQ, num_lanes, padded.width, shape)
            for _ in range(shape.num_layers if keeps_copies else 1)
        ]
        self._copies = copies if keeps_copies else copies * shape.num_layers

    def begin(self) -> None:
        """Prepare for a step's layers."""
        padded = self._padded
        torch.add(self._starts_L, padded.newest_L, out=self._newest_L)
        for window in {*self._windows}:
            mask_LW = padded.mask_LW
            if window is not None:
                outside_LW = self._columns_W <= padded.newest_L[:, None] - window
                mask_LW = mask_LW.masked_fill(outside_LW, float("-inf"))
            self._masks[window] = mask_LW[:, None, None].to(self._query.dtype)

    def attend(self, layer: int, cache: Tensor) -> None:
        """Attend in `layer`, whose rows of keys and values `cache` holds."""
        copy, padded = self._copies[layer], self._padded
        if copy.filled:
            newest = cache.index_select(0, padded.newest_rows_L)
            copy.rows.index_copy_(0, self._newest_L, newest)
        else:
            torch.index_select(cache, 0, padded.cache_rows_LW.view(-1), out=copy.rows)
            copy.filled = self._keeps_copies
        mask = self._masks[self._windows[layer]]
        output = F.scaled_dot_product_attention(self._query, copy.key, copy.value, attn_mask=mask)
        self._output.copy_(output)


class _Copy:
    """Copied cache rows, [L·W, 2·K·d], and views of their keys and values, [L, K, W, d]."""

    def __init__(self, like: Tensor, num_lanes: int, width: int, shape: Shape) -> None:
        num_heads, head_dim = shape.num_kv_heads, shape.head_dim
        self.rows = like.new_empty(num_lanes * width, 2 * num_heads * head_dim)
        self.key, self.value = (
            half.view(num_lanes, width, num_heads, head_dim).transpose(1, 2)
            for half in self.rows.chunk(2, dim=1)
        )
        self.filled = False


Attention: TypeAlias = SpanAttention | PaddedAttention


def _grouped(rows_nQ: Tensor, shape: Shape) -> Tensor:
    """View one token's heads as [n, K, G, d].

    The queries of one key/value head all see every cached token, so they may stand where attention
    expects the tokens of a sequence, and no mask or repetition is needed.
    """
    return rows_nQ.view(len(rows_nQ), shape.num_kv_heads, -1, shape.head_dim)
