"""Decoding steps as recorded graphs: on CUDA a step of small models is mostly kernel launches.

Shapes as in `layout`; N rows and W tokens here are a graph's own, at least a step's.

A graph is recorded for fixed shapes, so a step is padded to a bucket of rows and of cached tokens:
its layout is copied into the graph's, whose further rows write to the arena's scratch row and see
nothing else. All but attention is grouped by a tensor (`Grouping.ends_M`), so members may share the
rows out as they like. Drawing stays outside, as it follows each request's options.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.engines.stacked.cache import Arena
from models.engines.stacked.layout import Grouping, Layout, Padded
from models.engines.stacked.model import StackedModel

logger = logging.getLogger(__name__)

Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Makes of a function, which reads and writes the same tensors each time, one that repeats it."""

_LEAST_WIDTH = 64
_MOST_ROWS = 256
# What a graph may copy of the cache in one layer; beyond, launches cost little in comparison.
_MOST_COPIED_BYTES = 64 * 2**20
_MOST_GRAPHS = 48


@dataclass(frozen=True, slots=True)
class _Graph:
    layout: Layout
    step: Callable[[], Tensor]  # holds the tensors that the recording writes to
    replay: Callable[[], Tensor]


class DecodeGraphs:
    """Records a graph when a shape comes for the first time; the least recently used goes first."""

    def __init__(
        self, model: StackedModel, arena: Arena, *, num_members: int, record: Record
    ) -> None:
        self._model, self._arena, self._record = model, arena, record
        self._num_members = num_members
        self._graphs: OrderedDict[tuple[int, int], _Graph] = OrderedDict()
        self._failed = False

    def logits(self, layout: Layout) -> Tensor | None:
        """Run a step; return next-token logits [L, V] of its lanes, valid until the next call.

        None where the step must be run otherwise: part of it is no decoding, or it is too large, or
        the device could not record one.
        """
        padded = layout.padded
        if padded is None or layout.spans or layout.sampled_rows_L is not None or self._failed:
            return None
        num_rows = 1 << (len(layout.positions_N) - 1).bit_length()
        width = max(_LEAST_WIDTH, 1 << (padded.mask_LW.shape[1] - 1).bit_length())
        cache = self._arena.layers[0]
        copied_bytes = num_rows * width * cache.shape[1] * cache.element_size()
        if num_rows > _MOST_ROWS or copied_bytes > _MOST_COPIED_BYTES:
            return None
        graph = self._graphs.get((num_rows, width))
        if graph is None:
            graph = self._recorded(layout, num_rows, width)
            if graph is None:
                return None
        else:
            self._graphs.move_to_end((num_rows, width))
            _load(graph.layout, layout, self._arena.scratch_row)
        return graph.replay()[: len(layout.positions_N)]

    def _recorded(self, layout: Layout, num_rows: int, width: int) -> _Graph | None:
        own = _empty_layout(num_rows, width, self._num_members, layout.positions_N.device)
        _load(own, layout, self._arena.scratch_row)
        buffers = self._model.buffers(own, keeps_copies=False)

        def step() -> Tensor:
            hidden_ND = self._model.forward(own, self._arena, buffers)
            return self._model.logits(hidden_ND, own.lanes)

        try:
            graph = _Graph(own, step, self._record(step))
        except RuntimeError:
            logger.exception("this device records no graphs: steps are launched kernel by kernel")
            self._failed = True
            self._graphs.clear()
            return None
        self._graphs[num_rows, width] = graph
        if len(self._graphs) > _MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return graph


def record_cuda(device: torch.device) -> Record:
    """Return what records CUDA graphs on `device`, in one pool of memory."""
    with torch.cuda.device(device):
        pool = torch.cuda.graph_pool_handle()

    def record(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with torch.cuda.device(device):
            # Libraries compile and allocate at first use, which cannot be recorded.
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                output = step()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    return record


def _empty_layout(num_rows: int, width: int, num_members: int, device: torch.device) -> Layout:
    """Return a decoding step's layout of fixed shapes, to be loaded."""

    def indices(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    grouping = Grouping(
        members_N=indices(num_rows),
        runs=None,
        ends_M=torch.zeros(num_members, dtype=torch.int32, device=device),
    )
    return Layout(
        parts=(),
        rows=grouping,
        tokens_N=indices(num_rows),
        positions_N=indices(num_rows),
        cache_rows_N=indices(num_rows),
        request_of_N=None,
        to_requests_N=indices(num_rows),
        to_members_N=indices(num_rows),
        padded=Padded(
            rows=slice(0, num_rows),
            cache_rows_LW=indices(num_rows, width),
            mask_LW=torch.zeros(num_rows, width, device=device),
            newest_L=indices(num_rows),
            newest_rows_L=indices(num_rows),
            num_cached=0,
        ),
        spans=[],
        lanes=grouping,
        sampled_rows_L=None,
        lanes_R=[],
    )


def _load(own: Layout, layout: Layout, scratch_row: int) -> None:
    """Copy `layout` into the graph's `own`; its rows beyond are the last member's."""
    padded, own_padded = layout.padded, own.padded
    assert padded is not None
    assert own_padded is not None
    assert own.to_requests_N is not None
    assert own.to_members_N is not None
    count, width = padded.mask_LW.shape
    own.rows.members_N[:count].copy_(layout.rows.members_N)
    own.rows.members_N[count:].fill_(len(own.rows.ends_M) - 1)
    own.rows.ends_M.copy_(layout.rows.ends_M)
    own.rows.ends_M[-1:].fill_(len(own.positions_N))
    order_N = torch.arange(len(own.positions_N), device=own.positions_N.device)
    for mine, its in (
        (own.to_requests_N, layout.to_requests_N),
        (own.to_members_N, layout.to_members_N),
    ):
        mine.copy_(order_N)
        if its is not None:
            mine[:count].copy_(its)
    own.tokens_N[:count].copy_(layout.tokens_N)
    own.positions_N[:count].copy_(layout.positions_N)
    own.positions_N[count:].fill_(0)
    own.cache_rows_N[:count].copy_(layout.cache_rows_N)
    own.cache_rows_N[count:].fill_(scratch_row)
    own_padded.cache_rows_LW.fill_(scratch_row)
    own_padded.cache_rows_LW[:count, :width].copy_(padded.cache_rows_LW)
    # Nobody sees the padding but rows of padding, which must see something.
    own_padded.mask_LW.fill_(float("-inf"))
    own_padded.mask_LW[count:, 0].fill_(0.0)
    own_padded.mask_LW[:count, :width].copy_(padded.mask_LW)
