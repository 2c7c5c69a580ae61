"""Threads that work for each client in turn, so that who brings much waits for it alone.

Whoever comes first is served first in an ordinary pool of threads: a client that sends a hundred
long texts at once would have all others wait for a hundred of them. Here a client's next piece of
work waits for at most one of each other client (round robin, as Nagle 1987 would have gateways do).
"""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import ContextVar
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# For whom the present task works: a key's id, or an address; "" for the server itself.
CLIENT: ContextVar[str] = ContextVar("shoal_client", default="")


class FairQueue(Generic[T]):
    """What waits for threads, in turn for each `CLIENT`, and for one client in order."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._items: OrderedDict[str, deque[T]] = OrderedDict()
        # One for each item, though not for which; False for each thread that is to end.
        self._tickets: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def put(self, item: T) -> None:
        """Add what is to be done for the present `CLIENT`."""
        with self._lock:
            self._items.setdefault(CLIENT.get(), deque()).append(item)
        self._tickets.put(True)

    def end(self) -> None:
        """Have one thread that asks get None, once all is taken that waits now."""
        self._tickets.put(False)

    def get(self) -> T | None:
        """Wait for the next item, and return it."""
        if not self._tickets.get():
            return None
        with self._lock:
            client, items = self._items.popitem(last=False)
            item = items.popleft()
            if items:
                self._items[client] = items
        return item

    def __len__(self) -> int:
        return self._tickets.qsize()

    @property
    def num_own(self) -> int:
        """How many items of the present `CLIENT` wait."""
        with self._lock:
            return len(self._items.get(CLIENT.get(), ()))


class FairThreads(ThreadPoolExecutor):
    """An executor of `num_threads` whose work is a `FairQueue`."""

    def __init__(self, num_threads: int, name: str) -> None:
        super().__init__(num_threads, name)
        self._waiting: FairQueue[tuple[Future[Any], Callable[[], Any]]] = FairQueue()

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have a thread do `work`, when it is the client's turn."""
        future: Future[T] = Future()
        super().submit(self._do_next)
        self._waiting.put((future, partial(work, *args, **kwargs)))
        return future

    def _do_next(self) -> None:
        following = self._waiting.get()
        if following is not None:
            settle(*following)


def settle(future: Future[T], work: Callable[[], T]) -> None:
    """Do `work` unless its `future` was cancelled, which then tells what came of it."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        found = work()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(found)
