"""What runs beside the requests, when it fails."""

import asyncio
import threading
import time

from router.workers import Worker


class Broken:
    """Work that fails at first, and then waits for its end."""

    def __init__(self, failures: int) -> None:
        self.left = failures
        self.well, self.end = threading.Event(), threading.Event()

    def work(self) -> None:
        """Fail, or wait."""
        if self.left:
            self.left -= 1
            raise ArithmeticError("an unforeseen number")
        self.well.set()
        self.end.wait(60)

    async def task(self) -> None:
        """Do the same on an event loop."""
        await asyncio.to_thread(self.work)


def test_a_thread_that_fails_begins_again() -> None:
    """Failures are counted and told, the work goes on, and what ends by itself stays ended."""
    worker, broken = Worker("clerk"), Broken(2)
    thread = worker.start_thread(broken.work)
    assert broken.well.wait(60)
    assert worker.num_failures == 2
    assert "an unforeseen number" in str(worker.failure), "it has only just begun again"
    end = time.monotonic() + 60
    while worker.failure is not None:
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    broken.end.set()
    thread.join(60)
    assert not thread.is_alive()


async def test_a_task_that_fails_begins_again() -> None:
    """On the event loop it is the same, and cancelling ends it."""
    worker, broken = Worker("clerk"), Broken(2)

    task = asyncio.create_task(worker.run(broken.task))
    await asyncio.to_thread(broken.well.wait, 60)
    broken.end.set()
    await task
    assert worker.num_failures == 2
