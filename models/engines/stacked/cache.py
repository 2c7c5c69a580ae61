"""Keys and values: whose rows are whose, and which of them a later prompt starts from.

A request with k lanes gets one contiguous region of k times its capacity when it is admitted, so
that nothing runs out of memory on the way. When it ends, the rows of each lane stay as long as
nobody needs the room, the least recently used go first, and a prompt that begins with the same
tokens copies them in place of computing them: a later turn of a conversation, the second stage of
a cascade on the same member, another of `n` choices, the next step of union fusion. A copy costs
about a hundredth of computing, and every request's rows stay together.

Rows depend on the tokens before them and on nothing else, so no token of any answer changes.
Running requests lend theirs as well; one whose prompt is being computed by another waits for it.
Prefixes are looked up by chained hashes of blocks of tokens, as in vLLM (Kwon et al. 2023, section
4.4), and then compared token by token, so that no collision can lend a stranger's rows.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.card import Shape
from models.engines.stacked.sequence import Sequence

# A shorter common prefix is computed: looking it up would cost about as much.
BLOCK_TOKENS = 16
# So many lanes stay; more would make looking up slower than what toys compute.
_MOST_KEPT = 512


class Arena:
    """Rows of keys and values for every layer: `layers[i]` is [rows + 1, 2·K·d], keys first.

    The last is nobody's: padding writes to it, and reads it before that.
    """

    def __init__(
        self, shape: Shape, memory_bytes: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        width = 2 * shape.num_kv_heads * shape.head_dim
        self.row_bytes = row_bytes(shape, dtype)
        self.num_rows = memory_bytes // self.row_bytes
        self._all = torch.empty(
            (shape.num_layers, self.num_rows + 1, width), device=device, dtype=dtype
        )
        self._all[:, -1] = 0
        self.layers: tuple[Tensor, ...] = self._all.unbind(0)
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
        """Give a region, or a part of one, back."""
        if num_rows == 0:
            return
        insort(self._free, (start, num_rows))
        i = self._free.index((start, num_rows))
        merged: list[tuple[int, int]] = []
        for region in self._free[max(i - 1, 0) : i + 2]:
            if merged and sum(merged[-1]) == region[0]:
                merged[-1] = (merged[-1][0], merged[-1][1] + region[1])
            else:
                merged.append(region)
        self._free[max(i - 1, 0) : i + 2] = merged
        self.num_rows_used -= num_rows

    def copy(self, source: int, target: int, num_rows: int) -> None:
        """Copy the rows from `source` on to those from `target` on, in every layer."""
        self._all[:, target : target + num_rows] = self._all[:, source : source + num_rows]


def row_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Return the bytes of one token's keys and values in all layers."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize


@dataclass(eq=False, slots=True)
class _Lane:
    """Where the rows of `tokens` of one member are; those of an `owner` who runs are its own."""

    member: int
    tokens: Seq[int]
    first_row: int
    owner: Sequence | None
    keys: list[tuple[int, int]] = field(default_factory=list)

    @property
    def num_ready(self) -> int:
        """How many tokens have been computed."""
        return len(self.tokens) if self.owner is None else self.owner.num_cached


class PrefixCache:
    """Gives requests their regions, and what others have computed; see the module's docstring."""

    def __init__(self, arena: Arena, *, keeps: bool = True) -> None:
        """Without `keeps` every prompt is computed anew."""
        self._arena, self._keeps = arena, keeps
        # By member and chained hash of the tokens, the newest last.
        self._lanes: dict[tuple[int, int], dict[_Lane, None]] = {}
        self._running: dict[Sequence, list[_Lane]] = {}
        self._kept: OrderedDict[_Lane, None] = OrderedDict()  # least recently used first
        self._num_rows_kept = 0

    @property
    def num_rows_held(self) -> int:
        """Rows of running requests; what is only kept is free for whoever needs it."""
        return self._arena.num_rows_used - self._num_rows_kept

    def admit(self, sequence: Sequence) -> bool:
        """Give a request its region; False where there is no room, even if nothing is kept."""
        while (start := self._arena.allocate(sequence.num_rows)) is None and self._kept:
            self._drop(next(iter(self._kept)))
        sequence.region_start = start
        return start is not None

    def begin(self, sequence: Sequence, *, lends: bool = True) -> bool:
        """Start a prompt from the longest prefix that all its lanes find.

        False: not yet, another request is computing what this one can use. One that `lends`
        nothing before its end is nobody that others wait for.
        """
        if not self._keeps:
            sequence.num_reused = 0
            return True
        assert sequence.region_start is not None, "only admitted requests begin"
        found = [self._find(member, sequence.request.prompt_tokens) for member in sequence.members]
        first_rows, due = list(_first_rows(sequence)), sequence.due
        common, ready = _shared([found[lane] for lane in due])
        if sequence.reads_prompt:  # what the members say of it, they must compute
            common = 0
        if common - ready >= BLOCK_TOKENS:
            return False
        sequence.num_reused = sequence.num_cached = min(common, ready)
        if sequence.lead_alone:
            sequence.num_followed = min(_shared(found[1:]))
        for lane, ((source, _), first_row) in enumerate(zip(found, first_rows, strict=True)):
            num_tokens = sequence.num_cached_of(lane)
            if num_tokens and source is not None:
                self._arena.copy(source.first_row, first_row, num_tokens)
                if source in self._kept:
                    self._kept.move_to_end(source)
        # Those who follow a lead may never compute the prompt: nobody is to wait for that.
        self._running[sequence] = [
            self._enter(_Lane(sequence.members[i], sequence.tokens, first_rows[i], sequence))
            for i in (due if lends else ())
        ]
        return True

    def end(self, sequence: Sequence) -> None:
        """Take a request's region back; the rows that it has computed stay while there is room."""
        assert sequence.region_start is not None, "only admitted requests end"
        for lane in self._running.pop(sequence, ()):
            self._leave(lane)
        for i, first_row in enumerate(_first_rows(sequence)):
            num_kept = sequence.num_cached_of(i) if self._keeps else 0
            num_kept = num_kept if num_kept >= BLOCK_TOKENS else 0
            self._arena.release(first_row + num_kept, sequence.capacity_tokens - num_kept)
            if num_kept:
                tokens = tuple(sequence.tokens[:num_kept])
                self._keep(_Lane(sequence.members[i], tokens, first_row, None))
        sequence.region_start = None

    def clear(self) -> None:
        """Forget all that is kept: after a failure nobody is to start from what it touched."""
        for lane in list(self._kept):
            self._drop(lane)

    def forget(self, member: int) -> None:
        """Forget what is kept of a member, which is to be another one."""
        for lane in [lane for lane in self._kept if lane.member == member]:
            self._drop(lane)

    def _find(self, member: int, prompt: Seq[int]) -> tuple[_Lane | None, int]:
        """Return the lane with the longest common prefix, and its tokens, but not all of `prompt`.

        The last token is always computed, as what follows it is drawn from that.
        """
        found = None
        for key in _chain(member, prompt[: len(prompt) - 1]):
            if key not in self._lanes:
                break
            found = next(reversed(self._lanes[key]))
        if found is None:
            return None, 0
        most = min(len(prompt) - 1, len(found.tokens))
        same = 0
        while same < most and found.tokens[same] == prompt[same]:
            same += 1
        return (found, same) if same >= BLOCK_TOKENS else (None, 0)

    def _keep(self, lane: _Lane) -> None:
        # A conversation's earlier turn is a part of its later one.
        sharing = {
            e: None for key in _chain(lane.member, lane.tokens) for e in self._lanes.get(key, ())
        }
        for earlier in sharing:
            if earlier in self._kept and lane.tokens[: len(earlier.tokens)] == earlier.tokens:
                self._drop(earlier)
        self._kept[self._enter(lane)] = None
        self._num_rows_kept += len(lane.tokens)
        if len(self._kept) > _MOST_KEPT:
            self._drop(next(iter(self._kept)))

    def _drop(self, lane: _Lane) -> None:
        del self._kept[lane]
        self._leave(lane)
        self._num_rows_kept -= len(lane.tokens)
        self._arena.release(lane.first_row, len(lane.tokens))

    def _enter(self, lane: _Lane) -> _Lane:
        lane.keys = list(_chain(lane.member, lane.tokens))
        for key in lane.keys:
            self._lanes.setdefault(key, {})[lane] = None
        return lane

    def _leave(self, lane: _Lane) -> None:
        for key in lane.keys:
            del self._lanes[key][lane]
            if not self._lanes[key]:
                del self._lanes[key]


def _shared(found: Seq[tuple[_Lane | None, int]]) -> tuple[int, int]:
    """Return how many tokens all of these lanes share with a prompt, and have computed."""
    common = min(num_tokens for _, num_tokens in found)
    return common, min((lane.num_ready for lane, _ in found if lane is not None), default=0)


def _first_rows(sequence: Sequence) -> Iterator[int]:
    """Yield where each lane of a request begins."""
    assert sequence.region_start is not None, "only admitted requests have rows"
    for lane in range(sequence.num_lanes):
        yield sequence.region_start + lane * sequence.capacity_tokens


def _chain(member: int, tokens: Seq[int]) -> Iterator[tuple[int, int]]:
    """Yield the keys of the whole blocks of `tokens`: each block's with all before it."""
    digest = 0
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        digest = hash((digest, *tokens[end - BLOCK_TOKENS : end]))
        yield member, digest
