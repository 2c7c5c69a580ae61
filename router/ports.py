"""Ports for processes that must be told one."""

import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
# Above what Ray gives its workers.
_FIRST, _USUAL_END = 20_000, 32_768


def free_port() -> int:
    """Return a port of this machine on which nobody listens.

    It is none of those that the kernel gives to outgoing connections: such a connection could have
    it before whoever is told of it listens. At random, for other processes choose too.

    Raises:
        OSError: a hundred were taken.
    """
    end = int(_RANGE.read_text().split()[0]) if _RANGE.is_file() else _USUAL_END
    for port in random.SystemRandom().sample(range(_FIRST, max(end, _USUAL_END)), 100):
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        return port
    raise OSError("no free port found in 100 tries")
