"""Which threads compute: as many as a step earns, and none that another's steps would wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# Measured on two cores of a Xeon: one member of 2 MB is 7% slower on two threads, eight of them
# are twice as fast.
_BYTES_PER_THREAD = 4 * 2**20
# So many rows through a matrix cost about as much as reading it.
_ROWS_PER_READ = 16


async def in_own_thread(
    function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
) -> Result:
    """Call a function that computes with torch in a thread that ends with it.

    OpenMP keeps helpers for every thread that has ever shared out an operation, and once there are
    more of them than processors, none of them waits awake: each operation of a step then wakes its
    helpers anew (SmolLM2 in int8 on two cores: 26 ms a token in place of 16).
    """
    own = ThreadPoolExecutor(1)
    try:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(own, lambda: function(*args, **kwargs))
    finally:
        own.shutdown(wait=False)


class StepThreads:
    """Sets the number of threads of torch around a step: as many CPU threads as it deserves.

    Sharing an operation out to threads costs microseconds, which a step of one small member, made
    of a hundred tiny operations, never earns back; and a thread that waits for its share takes time
    from the event loop. So a step gets a thread for every few megabytes of work, up to the limit.
    """

    def __init__(self, limit: int | None, member_bytes: int) -> None:
        """`limit` None: as many as torch has now; `member_bytes` are one member's weights."""
        self.limit = limit or torch.get_num_threads()
        self._member_bytes = member_bytes

    def deserved(self, num_members: int, num_rows: int) -> int:
        """Return the threads of a step of `num_rows` rows over `num_members` active members."""
        work_bytes = self._member_bytes * max(num_members, num_rows / _ROWS_PER_READ)
        return min(self.limit, 1 + int(work_bytes / _BYTES_PER_THREAD))

    @contextmanager
    def step(self, num_members: int, num_rows: int) -> Iterator[None]:
        """Compute with as many threads as the step deserves, on the calling thread."""
        if self.limit == 1:
            yield
            return
        torch.set_num_threads(self.deserved(num_members, num_rows))
        try:
            yield
        finally:
            torch.set_num_threads(self.limit)
