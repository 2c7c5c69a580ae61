"""A network of the tests' own, where loopback can be cut between two ports in one direction."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from typing import Final

_CLONE_NEWNET: Final = 0x40000000  # linux/sched.h


class Network:
    """Cuts packets on loopback, in the network namespace that this thread is in."""

    @contextlib.contextmanager
    def cut(self, half: str, port: int) -> Iterator[None]:
        """Let nothing through "to" `port`, or "from" it, while the block runs."""
        which = {"to": "dport", "from": "sport"}[half]
        rule = ["pref", "10", "ipproto", "tcp", which, str(port)]
        _ip("rule", "add", *rule, "blackhole")
        try:
            yield
        finally:
            _ip("rule", "del", *rule)


@contextlib.contextmanager
def own_network() -> Iterator[Network | None]:
    """Put this thread, and what it starts, into a network with nothing but loopback.

    Yields None, and changes nothing, where that is not allowed: it needs root on Linux.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(_CLONE_NEWNET) != 0:
            yield None
            return
        _ip("link", "set", "lo", "up")
        # Loopback is looked up first of all; a rule that cuts must come before.
        _ip("rule", "add", "pref", "100", "lookup", "local")
        _ip("rule", "del", "pref", "0")
        yield Network()
        assert libc.setns(before, _CLONE_NEWNET) == 0
    finally:
        os.close(before)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
