"""Threads work for each client in turn."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextvars import copy_context
from typing import Any

import pytest

from models.fair import CLIENT, FairQueue, FairThreads


def _as(client: str, put: Callable[[], object]) -> object:
    context = copy_context()
    context.run(CLIENT.set, client)
    return context.run(put)


@pytest.fixture
def threads() -> Iterator[FairThreads]:
    """One thread, on which work waits until the test has put all there is."""
    with FairThreads(1, "test") as found:
        yield found


def test_who_brings_much_waits_for_it_alone(threads: FairThreads) -> None:
    """One piece of another's is done after one of a hundred, and a client's own in order."""
    begin, done = threading.Event(), list[str]()
    futures: list[Future[Any]] = [threads.submit(begin.wait, 60)]

    def bring(client: str, num: int) -> None:
        futures.extend(threads.submit(done.append, f"{client}{number}") for number in range(num))

    _as("greedy", lambda: bring("greedy", 100))
    _as("ann", lambda: bring("ann", 2))
    _as("bob", lambda: bring("bob", 1))
    begin.set()
    for future in futures:
        future.result(60)
    first = ["greedy0", "ann0", "bob0", "greedy1", "ann1", "greedy2"]
    assert done[:6] == first
    assert done[6:] == [f"greedy{number}" for number in range(3, 100)]


def test_tells_what_came_of_it(threads: FairThreads) -> None:
    """Results, errors, and that somebody no longer waits, reach the futures."""
    begin = threading.Event()
    blocking = threads.submit(begin.wait, 60)
    right, wrong = threads.submit(int, "12"), threads.submit(int, "x")
    unwanted = threads.submit(pytest.fail, "nobody waits for this")
    assert unwanted.cancel()
    begin.set()
    assert blocking.result(60)
    assert right.result(60) == 12
    with pytest.raises(ValueError, match="invalid literal"):
        wrong.result(60)


def test_ends_when_all_is_taken() -> None:
    """Whoever is told to end has been given what waited before, whomever it was for."""
    waiting = FairQueue[str]()
    for client in ("a", "a", "b"):
        _as(client, lambda client=client: waiting.put(client))  # type: ignore[misc]
    waiting.end()
    assert len(waiting) == 4
    assert [waiting.get() for _ in range(4)] == ["a", "b", "a", None]
