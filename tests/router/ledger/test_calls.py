"""Database calls of the event loop, while the database hangs, fails and comes back."""

import asyncio
import logging
import subprocess
import sys
import threading
import time

import pytest
from sqlalchemy.exc import IntegrityError, OperationalError

from models.fair import CLIENT
from router.ledger.calls import Calls, DatabaseUnavailable


def _refuse() -> None:
    raise OperationalError("SELECT secret", {}, OSError("nobody listens"))


def test_a_database_that_hangs_is_given_up_and_taken_up_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Who waits is told in time, others at once; then one tries, and all goes on. Two log lines."""
    calls, hanging = Calls(timeout_s=0.2, num_threads=1), threading.Event()

    async def run() -> None:
        with pytest.raises(DatabaseUnavailable, match="no answer within"):
            await calls.run(hanging.wait, 60)
        with pytest.raises(DatabaseUnavailable, match="away") as caught:
            await calls.run(str, 1)
        assert 0 < caught.value.retry_after_s <= 1
        hanging.set()
        async with asyncio.timeout(60):
            while True:
                try:
                    assert await calls.run(str, 1) == "1"
                    break
                except DatabaseUnavailable:
                    await asyncio.sleep(0.05)

    with caplog.at_level(logging.WARNING, "router.ledger.calls"):
        asyncio.run(run())
    calls.close()
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


async def test_only_an_absent_database_opens_the_circuit() -> None:
    """A refused connection does, and tells no statement; what a statement did wrong does not."""
    calls = Calls(timeout_s=60)

    def collide() -> None:
        raise IntegrityError("INSERT", {}, ValueError("taken"))

    with pytest.raises(IntegrityError):
        await calls.run(collide)
    assert await calls.run(str, 1) == "1"
    with pytest.raises(DatabaseUnavailable) as caught:
        await calls.run(_refuse)
    assert str(caught.value) == "nobody listens"
    with pytest.raises(DatabaseUnavailable):
        await calls.run(str, 1)
    calls.close()


async def test_who_asks_for_too_much_is_refused_alone() -> None:
    """A call that takes too long, or that the database cuts off, while others are answered."""
    calls, hanging = Calls(timeout_s=0.3, num_threads=2), threading.Event()

    def cut_off() -> None:
        raise OperationalError("SELECT secret", {}, OSError("interrupted"))

    slow = asyncio.create_task(calls.run(hanging.wait, 60))
    while not slow.done():
        assert await calls.run(str, 1) == "1"
        await asyncio.sleep(0.02)
    for call in (slow, calls.run(cut_off)):
        with pytest.raises(DatabaseUnavailable):
            await call
        assert await calls.run(str, 1) == "1", "the circuit is closed"
    hanging.set()
    calls.close()


async def test_nobody_takes_all_the_room_to_wait() -> None:
    """A client's thousand calls are refused from half of the room on; another's has its turn."""
    calls, hanging = Calls(timeout_s=60, num_threads=1), threading.Event()
    done: list[str] = []

    async def call(client: str) -> None:
        CLIENT.set(client)
        await calls.run(done.append, client)

    first = asyncio.create_task(calls.run(hanging.wait, 60))
    await asyncio.sleep(0)
    greedy = [asyncio.create_task(call("greedy")) for _ in range(1000)]
    await asyncio.sleep(0)
    modest = asyncio.create_task(call("modest"))
    await asyncio.sleep(0)
    hanging.set()
    told = await asyncio.gather(first, *greedy, modest, return_exceptions=True)
    refused = [one for one in told if isinstance(one, DatabaseUnavailable)]
    assert len(refused) == 1000 - done.count("greedy")
    assert 200 < done.count("greedy") < 300
    assert done.index("modest") <= 2
    calls.close()


def test_a_call_that_hangs_keeps_no_process_from_ending() -> None:
    """The interpreter does not wait for the thread."""
    program = (
        "import asyncio, time\n"
        "from router.ledger.calls import Calls\n"
        "async def main():\n"
        "    try: await Calls(timeout_s=0.1).run(time.sleep, 600)\n"
        "    except Exception as error: print(type(error).__name__)\n"
        "asyncio.run(main())\n"
    )
    began_s = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300
    )
    assert ended.stdout.strip() == "DatabaseUnavailable"
    assert time.monotonic() - began_s < 300
