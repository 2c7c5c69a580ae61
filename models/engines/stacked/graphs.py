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

from models.engines.stacked.attention import Padded
from models.engines.stacked.cache import Arena
from models.engines.stacked.layout import Grouping, Layout, Order, Step
from models.engines.stacked.model import StackedModel

logger = logging.getLogger(__name__)

Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Makes of a function, which reads and writes the same tensors each time, one that repeats it."""

_LEAST_WIDTH = 64
_MOST_ROWS = 256
# What a graph may copy of the cache in one layer; beyond, launches cost little in comparison.
_MOST_COPIED_BYTES = 64 * 2**20
_MOST_GRAPHS = 48


class _GraphLayout:
    """The layout that a graph reads, of fixed shapes; each step's is loaded into it."""

    def __init__(
        self, num_rows: int, width: int, *, num_members: int, scratch_row: int, device: torch.device
    ) -> None:
        def indices() -> Tensor:
            return torch.zeros(num_rows, dtype=torch.int64, device=device)

        self._scratch_row = scratch_row
        self._order = Order(indices(), indices())
        self._padded = Padded.empty(num_rows, width, device)
        self._unordered_N = torch.arange(num_rows, device=device)
        self.layout = Layout(
            rows=Grouping(
                members_N=indices(),
                runs=(),
                ends_M=torch.zeros(num_members, dtype=torch.int32, device=device),
            ),
            tokens_N=indices(),
            positions_N=indices(),
            cache_rows_N=indices(),
            order=self._order,
            paths=(self._padded,),
        )

    def load(self, layout: Layout, padded: Padded) -> None:
        """Copy a step's `layout`, whose one path is `padded`; rows beyond are the last member's."""
        own, count = self.layout, len(layout.positions_N)
        own.rows.members_N[:count].copy_(layout.rows.members_N)
        own.rows.members_N[count:].fill_(len(own.rows.ends_M) - 1)
        own.rows.ends_M.copy_(layout.rows.ends_M)
        own.rows.ends_M[-1:].fill_(len(own.positions_N))
        self._order.to_requests_N.copy_(self._unordered_N)
        self._order.to_members_N.copy_(self._unordered_N)
        if layout.order is not None:
            self._order.to_requests_N[:count].copy_(layout.order.to_requests_N)
            self._order.to_members_N[:count].copy_(layout.order.to_members_N)
        own.tokens_N[:count].copy_(layout.tokens_N)
        own.positions_N[:count].copy_(layout.positions_N)
        own.positions_N[count:].fill_(0)
        own.cache_rows_N[:count].copy_(layout.cache_rows_N)
        own.cache_rows_N[count:].fill_(self._scratch_row)
        self._padded.load(padded, self._scratch_row)


@dataclass(frozen=True, slots=True)
class _Graph:
    loaded: _GraphLayout
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

    def logits(self, step: Step) -> Tensor | None:
        """Run a step; return next-token logits [L, V] of its lanes, valid until the next call.

        None where the step must be run otherwise: part of it is no decoding, or it is too large, or
        the device could not record one.
        """
        padded = step.decoding()
        if padded is None or self._failed:
            return None
        num_rows = 1 << (step.num_rows - 1).bit_length()
        width = max(_LEAST_WIDTH, 1 << (padded.width - 1).bit_length())
        cache = self._arena.layers[0]
        copied_bytes = num_rows * width * cache.shape[1] * cache.element_size()
        if num_rows > _MOST_ROWS or copied_bytes > _MOST_COPIED_BYTES:
            return None
        graph = self._graphs.get((num_rows, width))
        if graph is None:
            graph = self._recorded(step.layout, padded, num_rows, width)
            if graph is None:
                return None
        else:
            self._graphs.move_to_end((num_rows, width))
            graph.loaded.load(step.layout, padded)
        return graph.replay()[: step.num_rows]

    def _recorded(self, layout: Layout, padded: Padded, num_rows: int, width: int) -> _Graph | None:
        loaded = _GraphLayout(
            num_rows,
            width,
            num_members=self._num_members,
            scratch_row=self._arena.scratch_row,
            device=layout.positions_N.device,
        )
        loaded.load(layout, padded)
        own, buffers = loaded.layout, self._model.buffers(loaded.layout, keeps_copies=False)

        def step() -> Tensor:
            hidden_ND = self._model.forward(own, self._arena, buffers)
            return self._model.logits(hidden_ND, own.rows)

        try:
            graph = _Graph(loaded, step, self._record(step))
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
