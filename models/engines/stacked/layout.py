"""Which token of which lane is in which row of a step's tensors.

Shapes: N rows of a step (one per token per lane), L lanes that sample, R requests that sample,
M members, W cached tokens.

Two orders of the same rows are used. *Member-major* keeps the rows of one member together, so that
a projection is one batched product per run of members with equally many rows; everything but
attention runs in it. *Request-major* keeps a request's rows together, lane by lane, so that its
attention is one call on plain views of its cache region. Parts are ordered such that for routed
requests (one lane each) and for a single fused one the two orders are the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.engines.stacked.sequence import Sequence

Ints = NDArray[np.int64]

# Reading sequences one by one costs an attention call each, reading them together costs a padded
# copy. On CPU a call is worth about this many bytes of copying; on CUDA all are read together, as
# calls cannot be recorded whose shapes grow (see `graphs`), up to so many bytes a layer.
_BYTES_PER_CALL = 128 * 1024
_MOST_CUDA_BYTES = 256 * 2**20
_WIDTH_STEP_TOKENS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one request puts into a step: its next `num_tokens` tokens, on all its lanes."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the step ends with this request's next token."""
        return self.num_tokens == self.sequence.num_pending

    @property
    def num_rows(self) -> int:
        """Rows of the step that this takes."""
        return self.num_tokens * self.sequence.num_lanes


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring members with equally many rows: one batched product."""

    first_member: int
    num_members: int
    first_row: int
    rows_per_member: int

    @property
    def members(self) -> slice:
        """The members of the run."""
        return slice(self.first_member, self.first_member + self.num_members)

    @property
    def rows(self) -> slice:
        """The rows of all members of the run."""
        return slice(self.first_row, self.first_row + self.num_members * self.rows_per_member)


@dataclass(frozen=True, slots=True)
class Grouping:
    """Rows in member-major order: whose they are, and the products they take.

    `runs` is None where only the device knows which rows are whose (see `graphs`).
    """

    members_N: Tensor
    runs: tuple[Run, ...] | None
    ends_M: Tensor  # int32: one past each member's last row, for grouped products

    @property
    def num_members(self) -> int:
        """How many members have rows."""
        return sum(run.num_members for run in self.runs or ())


@dataclass(slots=True)
class Span:
    """One request's rows in request-major order, and where its cached tokens are."""

    rows: slice
    num_lanes: int
    num_tokens: int
    cache_row: int
    capacity_tokens: int
    num_cached: int  # tokens, with those of this step


@dataclass(slots=True)
class Padded:
    """Decoding lanes attended together: cache rows padded to one width, and a mask over them.

    A lane's padding repeats its newest row (never an unwritten one); `mask_LW` is 0 or -inf.
    `newest_L` is the place of each lane's newest row among all lanes' padded rows, and
    `newest_rows_L` that row in the cache.
    """

    rows: slice
    cache_rows_LW: Tensor
    mask_LW: Tensor
    newest_L: Tensor
    newest_rows_L: Tensor
    num_cached: int  # of the longest


@dataclass(slots=True)
class Layout:
    """The index tensors of one step. `advance` reuses them while the same requests decode."""

    parts: tuple[Part, ...]
    rows: Grouping
    tokens_N: Tensor
    positions_N: Tensor
    cache_rows_N: Tensor
    request_of_N: Tensor | None  # None: one request
    to_requests_N: Tensor | None  # None: both orders are the same
    to_members_N: Tensor | None
    padded: Padded | None
    spans: list[Span]
    lanes: Grouping  # of the lanes that sample
    sampled_rows_L: Tensor | None  # None: every row samples
    lanes_R: list[list[int]]  # of each request that samples, its lanes in L

    def continues(self, parts: Seq[Part]) -> bool:
        """Whether `parts` are this step again, one drawn token further.

        A prompt's chunk may be one token, too, but draws none.
        """
        return len(parts) == len(self.parts) == len(self.lanes_R) and all(
            new.sequence is old.sequence and new.num_tokens == old.num_tokens == 1
            for new, old in zip(parts, self.parts, strict=True)
        )

    def advance(self, tokens_R: Tensor) -> bool:
        """Move on by one token, in place; False where the padding is too narrow for it."""
        padded = self.padded
        if padded is not None:
            if padded.num_cached == padded.mask_LW.shape[1]:
                return False
            _widen(padded)
        self.positions_N += 1
        self.cache_rows_N += 1
        if self.request_of_N is None:
            self.tokens_N = tokens_R.expand(len(self.positions_N))
        else:
            self.tokens_N = tokens_R.index_select(0, self.request_of_N)
        for span in self.spans:
            span.num_cached += 1
        return True


def order_parts(parts: Iterable[Part]) -> list[Part]:
    """Decoding requests first, and each kind by members; see the module's docstring."""
    return sorted(parts, key=lambda part: (part.num_tokens > 1, part.sequence.members))


def build_layout(
    parts: Seq[Part], *, num_members: int, row_bytes: int, device: torch.device
) -> Layout:
    """Lay out `parts` (ordered by `order_parts`); `row_bytes` is a cache row's, in one layer."""
    starts = [_cache_row(part.sequence) for part in parts]
    members, positions, cache_rows, tokens, requests = [], [], [], [], []
    for r, (part, start) in enumerate(zip(parts, starts, strict=True)):
        sequence = part.sequence
        new = np.arange(sequence.num_cached, sequence.num_cached + part.num_tokens)
        lanes = np.arange(sequence.num_lanes)
        members.append(np.repeat(sequence.members, part.num_tokens))
        positions.append(np.tile(new, sequence.num_lanes))
        cache_rows.append((start + lanes[:, None] * sequence.capacity_tokens + new).ravel())
        tokens.append(np.tile(sequence.tokens[new[0] : new[-1] + 1], sequence.num_lanes))
        requests.append(np.full(part.num_rows, r))

    member_of = np.concatenate(members)
    order = np.argsort(member_of, kind="stable")  # member-major row -> request-major row
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    same = bool((order[1:] > order[:-1]).all())

    def rows(values: list[Ints]) -> Tensor:
        return torch.from_numpy(np.concatenate(values)[order]).to(device)

    last_rows = np.concatenate(
        [
            first + (np.arange(part.sequence.num_lanes) + 1) * part.num_tokens - 1
            for first, part in zip(_first_rows(parts), parts, strict=True)
            if part.samples
        ]
        or [np.empty(0, np.int64)]
    )
    sampled_rows = inverse[last_rows]
    lane_order = np.argsort(sampled_rows)
    lane_rank = np.empty_like(lane_order)
    lane_rank[lane_order] = np.arange(len(lane_order))
    num_lanes = [part.sequence.num_lanes for part in parts if part.samples]
    lanes_R = [lanes.tolist() for lanes in np.split(lane_rank, np.cumsum(num_lanes)[:-1])]

    padded, spans = _attention(parts, starts, row_bytes, device)
    all_sample = len(sampled_rows) == len(order)
    grouping = _group(member_of[order], num_members, device)
    return Layout(
        parts=tuple(parts),
        rows=grouping,
        tokens_N=rows(tokens),
        positions_N=rows(positions),
        cache_rows_N=rows(cache_rows),
        request_of_N=None if len(parts) == 1 else rows(requests),
        to_requests_N=None if same else torch.from_numpy(inverse).to(device),
        to_members_N=None if same else torch.from_numpy(order).to(device),
        padded=padded,
        spans=spans,
        lanes=grouping
        if all_sample
        else _group(member_of[last_rows[lane_order]], num_members, device),
        sampled_rows_L=None
        if all_sample
        else torch.from_numpy(sampled_rows[lane_order]).to(device),
        lanes_R=lanes_R if num_lanes else [],
    )


def group_rows(
    members: Seq[int], rows_per_member: int, num_members: int, device: torch.device
) -> Grouping:
    """Group equally many rows of each of `members`, which ascend."""
    return _group(np.repeat(np.asarray(members), rows_per_member), num_members, device)


def _cache_row(sequence: Sequence) -> int:
    assert sequence.region_start is not None, "only admitted requests take part in a step"
    return sequence.region_start


def _first_rows(parts: Seq[Part]) -> list[int]:
    return [0, *np.cumsum([part.num_rows for part in parts])[:-1].tolist()]


def _group(member_of: Ints, num_members: int, device: torch.device) -> Grouping:
    counts = np.bincount(member_of, minlength=num_members)
    ends = np.cumsum(counts)
    runs: list[Run] = []
    for member in np.flatnonzero(counts).tolist():
        count = int(counts[member])
        last = runs[-1] if runs else None
        if last and last.rows_per_member == count and last.members.stop == member:
            runs[-1] = Run(last.first_member, last.num_members + 1, last.first_row, count)
        else:
            runs.append(Run(member, 1, int(ends[member]) - count, count))
    return Grouping(
        members_N=torch.from_numpy(member_of).to(device),
        runs=tuple(runs),
        ends_M=torch.from_numpy(ends.astype(np.int32)).to(device),
    )


def _attention(
    parts: Seq[Part], starts: Seq[int], row_bytes: int, device: torch.device
) -> tuple[Padded | None, list[Span]]:
    """Choose how each request attends: the decoding ones together, or each by itself."""
    decoding = [part.sequence for part in parts if part.num_tokens == 1]
    width = max((sequence.num_cached for sequence in decoding), default=0) + 1
    width += -width % _WIDTH_STEP_TOKENS
    num_lanes = sum(sequence.num_lanes for sequence in decoding)
    num_bytes = num_lanes * width * row_bytes
    if device.type == "cuda":
        together = 0 < num_bytes <= _MOST_CUDA_BYTES
    else:
        together = len(decoding) > 1 and num_bytes < len(decoding) * _BYTES_PER_CALL
    spans = [
        Span(
            rows=slice(first, first + part.num_rows),
            num_lanes=part.sequence.num_lanes,
            num_tokens=part.num_tokens,
            cache_row=start,
            capacity_tokens=part.sequence.capacity_tokens,
            num_cached=part.sequence.num_cached + part.num_tokens,
        )
        for first, start, part in zip(_first_rows(parts), starts, parts, strict=True)
    ]
    if not together:
        return None, spans
    first_rows = np.concatenate(
        [
            span.cache_row + np.arange(span.num_lanes) * span.capacity_tokens
            for span in spans[: len(decoding)]
        ]
    )
    newest = np.repeat(
        [sequence.num_cached for sequence in decoding],
        [sequence.num_lanes for sequence in decoding],
    )[:, None]
    columns = np.arange(width)
    mask = np.where(columns <= newest, 0, -np.inf).astype(np.float32)
    lanes = np.arange(num_lanes)
    padded = Padded(
        rows=slice(0, num_lanes),
        cache_rows_LW=torch.from_numpy(first_rows[:, None] + np.minimum(columns, newest)).to(
            device
        ),
        mask_LW=torch.from_numpy(mask).to(device),
        newest_L=torch.from_numpy(lanes * width + newest[:, 0]).to(device),
        newest_rows_L=torch.from_numpy(first_rows + newest[:, 0]).to(device),
        num_cached=int(newest.max()) + 1,
    )
    return padded, spans[len(decoding) :]


def _widen(padded: Padded) -> None:
    """Let every lane see one more row: the one after its newest."""
    padded.newest_L += 1
    padded.newest_rows_L += 1
    padded.cache_rows_LW.view(-1).index_copy_(0, padded.newest_L, padded.newest_rows_L)
    padded.mask_LW.view(-1).index_fill_(0, padded.newest_L, 0.0)
    padded.num_cached += 1
