"""How many CPU threads a step deserves.

Sharing an operation out to threads costs microseconds, which a step of one small member, made of
a hundred tiny operations, never earns back; and a thread that waits for its share takes time from
the event loop. So a step gets a thread for every few megabytes of work, up to the limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Measured on two cores of a Xeon: one member of 2 MB is 7% slower on two threads, eight of them
# are twice as fast.
_BYTES_PER_THREAD = 4 * 2**20
# So many rows through a matrix cost about as much as reading it.
_ROWS_PER_READ = 16


class StepThreads:
    """Sets the number of threads of torch around a step."""

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
