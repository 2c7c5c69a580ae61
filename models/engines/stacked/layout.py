"""Where a step's tokens stand: in the rows of its tensors, and in those of the key/value cache.

Shapes: N rows of a step (one per token per lane), L lanes that sample, R tokens that are drawn
(one for a request, more after a draft), M members, K key/value heads, d head size.

Two orders of the same rows are used. *Member-major* keeps the rows of one member together, so that
a projection is one batched product per run of members with equally many rows; everything but
attention runs in it. *Request-major* keeps a request's rows together, lane by lane, so that its
attention is one call on plain views of its cache region. Parts are ordered such that for routed
requests (one lane each) and for a single fused one the two orders are the same.

A cache row holds the keys and values of one token of one lane in one layer. A request with k lanes
has one contiguous region of k times its capacity (see `cache`), so that its lanes' keys are plain
views.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.engines.stacked.attention import Padded, Path, Span, choose_paths
from models.engines.stacked.sequence import Sequence

Ints = NDArray[np.int64]


class Part:
    """What one request puts into a step: its next `num_tokens` tokens, on the lanes due.

    The last of them may be a `draft` of tokens to come (see `drafts`). The lanes are those of
    `members`; `drafts` are, for each token that the step draws, what of the draft comes before it:
    none unless the step ends with the request's next token.
    """

    __slots__ = ("draft", "drafts", "members", "num_lanes", "num_rows", "num_tokens", "sequence")

    def __init__(self, sequence: Sequence, num_tokens: int, draft: tuple[int, ...] = ()) -> None:
        due = sequence.due
        samples = num_tokens == sequence.num_pending + len(draft)
        self.sequence, self.num_tokens, self.draft = sequence, num_tokens, draft
        self.members = sequence.members[due.start : due.stop]
        self.num_lanes = len(due)
        self.num_rows = num_tokens * self.num_lanes
        self.drafts = [draft[:i] for i in range(len(draft) + 1)] if samples else []


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

    `runs` is empty where only the device knows which rows are whose (see `graphs`).
    """

    members_N: Tensor
    runs: tuple[Run, ...]
    ends_M: Tensor  # int32: one past each member's last row, for grouped products

    @property
    def num_members(self) -> int:
        """How many members have rows."""
        return sum(run.num_members for run in self.runs)


@dataclass(frozen=True, slots=True)
class Order:
    """Permutations between the two orders: each says where the rows of the other come from."""

    to_requests_N: Tensor
    to_members_N: Tensor


@dataclass(slots=True)
class Layout:
    """What the forward pass reads, in member-major order."""

    rows: Grouping
    tokens_N: Tensor
    positions_N: Tensor
    cache_rows_N: Tensor
    order: Order | None  # None: both orders are the same
    paths: tuple[Path, ...]  # their rows are request-major


@dataclass(slots=True)
class Step:
    """A layout, and whose its rows are. `advance` reuses both while the same requests decode."""

    parts: tuple[Part, ...]
    layout: Layout
    request_of_N: Tensor | None  # None: one request
    lanes: Grouping  # of the lanes that sample
    sampled_rows_L: Tensor | None  # None: every row samples
    lanes_R: list[list[int]]  # of each token drawn, its request's lanes in L
    num_tokens_R: list[int]  # of each part's request: prompt and answer so far

    @property
    def num_rows(self) -> int:
        """Rows of all parts."""
        return len(self.layout.positions_N)

    def decoding(self) -> Padded | None:
        """Return the path of all, if they decode together and nothing else is in the step."""
        match self.layout.paths:
            case (Padded() as padded,) if self.sampled_rows_L is None:
                return padded
        return None

    def continues(self, parts: Seq[Part], token_ids: Seq[int]) -> bool:
        """Whether `parts` are this step again, one drawn token further; `token_ids` were drawn.

        A prompt's chunk may be one token, too, but draws none; and where a lane guesses, another
        token may have come instead, or several.
        """
        return len(parts) == len(self.parts) == len(self.lanes_R) and all(
            new.sequence is old.sequence
            and new.num_tokens == old.num_tokens == 1
            and new.sequence.tokens[end:] == [token]
            for new, old, end, token in zip(
                parts, self.parts, self.num_tokens_R, token_ids, strict=True
            )
        )

    def advance(self, tokens_R: Tensor) -> bool:
        """Move on by one token, in place; False where a path has no room for it."""
        layout = self.layout
        if not all(path.advance() for path in layout.paths):
            return False
        self.num_tokens_R = [end + 1 for end in self.num_tokens_R]
        layout.positions_N += 1
        layout.cache_rows_N += 1
        if self.request_of_N is None:
            layout.tokens_N = tokens_R.expand(self.num_rows)
        else:
            layout.tokens_N = tokens_R.index_select(0, self.request_of_N)
        return True


def order_parts(parts: Iterable[Part]) -> list[Part]:
    """Decoding requests first, and each kind by members; see the module's docstring."""
    return sorted(parts, key=lambda part: (part.num_tokens > 1, part.members))


def build_step(parts: Seq[Part], *, num_members: int, row_bytes: int, device: torch.device) -> Step:
    """Lay out `parts` (ordered by `order_parts`); `row_bytes` is a cache row's, in one layer."""
    spans = _spans(parts)
    members, positions, cache_rows, tokens, requests = [], [], [], [], []
    for r, (part, span) in enumerate(zip(parts, spans, strict=True)):
        sequence = part.sequence
        new = np.arange(span.num_cached - part.num_tokens, span.num_cached)
        lanes = np.arange(span.num_lanes)
        members.append(np.repeat(part.members, part.num_tokens))
        positions.append(np.tile(new, span.num_lanes))
        cache_rows.append((span.cache_row + lanes[:, None] * span.capacity_tokens + new).ravel())
        known = [*sequence.tokens[new[0] : new[-1] + 1], *part.draft]
        tokens.append(np.tile(known, span.num_lanes))
        requests.append(np.full(part.num_rows, r))

    member_of = np.concatenate(members)
    order = np.argsort(member_of, kind="stable")  # member-major row -> request-major row
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    same = bool((order[1:] > order[:-1]).all())

    def tensor(values: Ints) -> Tensor:
        return torch.from_numpy(values).to(device)

    def rows(values: list[Ints]) -> Tensor:
        return tensor(np.concatenate(values)[order])

    last_rows = np.concatenate(
        [
            span.rows.start
            + (np.arange(span.num_lanes) + 1) * part.num_tokens
            - (1 + len(part.draft) - len(before))
            for part, span in zip(parts, spans, strict=True)
            for before in part.drafts
        ]
        or [np.empty(0, np.int64)]
    )
    sampled_rows = inverse[last_rows]
    lane_order = np.argsort(sampled_rows)
    lane_rank = np.empty_like(lane_order)
    lane_rank[lane_order] = np.arange(len(lane_order))
    num_lanes = [part.num_lanes for part in parts for _ in part.drafts]
    lanes_R = [lanes.tolist() for lanes in np.split(lane_rank, np.cumsum(num_lanes)[:-1])]

    all_sample = len(sampled_rows) == len(order)
    grouping = _group(member_of[order], num_members, device)
    return Step(
        parts=tuple(parts),
        layout=Layout(
            rows=grouping,
            tokens_N=rows(tokens),
            positions_N=rows(positions),
            cache_rows_N=rows(cache_rows),
            order=None if same else Order(tensor(inverse), tensor(order)),
            paths=choose_paths(spans, row_bytes, device),
        ),
        request_of_N=None if len(parts) == 1 else rows(requests),
        lanes=grouping
        if all_sample
        else _group(member_of[last_rows[lane_order]], num_members, device),
        sampled_rows_L=None if all_sample else tensor(sampled_rows[lane_order]),
        lanes_R=lanes_R if num_lanes else [],
        num_tokens_R=[len(part.sequence.tokens) for part in parts],
    )


def group_rows(
    members: Seq[int], rows_per_member: int, num_members: int, device: torch.device
) -> Grouping:
    """Group equally many rows of each of `members`, which ascend."""
    return _group(np.repeat(np.asarray(members), rows_per_member), num_members, device)


def _spans(parts: Seq[Part]) -> list[Span]:
    spans, first = list[Span](), 0
    for part in parts:
        sequence, first_lane = part.sequence, part.sequence.due.start
        assert sequence.region_start is not None, "only admitted requests take part in a step"
        spans.append(
            Span(
                rows=slice(first, first + part.num_rows),
                num_lanes=part.num_lanes,
                num_tokens=part.num_tokens,
                cache_row=sequence.region_start + first_lane * sequence.capacity_tokens,
                capacity_tokens=sequence.capacity_tokens,
                num_cached=sequence.num_cached_of(first_lane) + part.num_tokens,
            )
        )
        first += part.num_rows
    return spans


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
