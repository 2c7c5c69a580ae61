"""Circuit breakers: a server that fails again and again is left alone for a while.

A request may be what makes a server fail: one that it crashes on, or works on for too long. So what
fails counts for the client who sent it, and for all where nobody could connect at all, or where the
requests of several clients fail: nobody can shut the others out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from models.engines.base import Circuit

_MOST_CLIENTS = 1024


class CircuitBreaker:
    """Closed until `failures` attempts in a row have failed; then open for `open_s`; then
    half-open: one attempt is let through, and its end closes or opens the circuit again.

    An attempt is over when exactly one of `succeeded`, `failed` and `abandoned` has been called.
    Not thread-safe: it lives on one event loop. `clock` counts seconds.
    """

    def __init__(self, *, failures: int, open_s: float, clock: Callable[[], float]) -> None:
        self._limit = failures
        self._open_s = open_s
        self._clock = clock
        self._num_failures = 0
        self._opened_s: float | None = None
        self._probing = False

    @property
    def state(self) -> Circuit:
        """The state, as health shows it."""
        if self._opened_s is None:
            return "closed"
        return "half-open" if self._probing or self.wait_s() == 0 else "open"

    def wait_s(self) -> float:
        """Return how long no attempt will be let through, at least."""
        if self._opened_s is None:
            return 0.0
        return max(0.0, self._opened_s + self._open_s - self._clock())

    def admit(self) -> bool:
        """Return whether an attempt may begin now; it has begun if so."""
        if self._opened_s is None:
            return True
        if self._probing or self.wait_s() > 0:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        """The server answered."""
        self._num_failures, self._opened_s, self._probing = 0, None, False

    def failed(self) -> None:
        """The server did not answer, or said that it cannot."""
        self._num_failures += 1
        if self._probing or self._num_failures >= self._limit:
            self._opened_s = self._clock()
        self._probing = False

    def abandoned(self) -> None:
        """The attempt ended without telling anything of the server: its client left."""
        self._probing = False


class Circuits:
    """The circuit of a server, and those of clients whose requests failed there.

    An attempt that was admitted is over when exactly one of `succeeded`, `failed` and `abandoned`
    has been called for its client. Not thread-safe.
    """

    def __init__(self, *, failures: int, open_s: float, clock: Callable[[], float]) -> None:
        def circuit() -> CircuitBreaker:
            return CircuitBreaker(failures=failures, open_s=open_s, clock=clock)

        self._new = circuit
        self._server = circuit()
        self._clients: OrderedDict[str, CircuitBreaker] = OrderedDict()

    @property
    def state(self) -> Circuit:
        """The server's state or, where that is closed, the worst of a client's."""
        states = {one.state for one in (self._server, *self._clients.values())}
        worst: tuple[Circuit, ...] = ("open", "half-open")
        return next((state for state in worst if state in states), "closed")

    def wait_s(self, client: str) -> float:
        """Return how long no attempt of `client` will be let through, at least."""
        own = self._clients.get(client)
        return max(self._server.wait_s(), 0.0 if own is None else own.wait_s())

    def admit(self, client: str) -> bool:
        """Return whether an attempt of `client` may begin now; it has begun if so."""
        own = self._clients.get(client)
        if own is not None and not own.admit():
            return False
        admitted = self._server.admit()
        if own is not None and not admitted:
            own.abandoned()
        return admitted

    def succeeded(self, client: str) -> None:
        """The server answered `client`: whose circuits are not open begin anew."""
        self._server.succeeded()
        self._clients.pop(client, None)
        for name in [name for name, one in self._clients.items() if one.state == "closed"]:
            del self._clients[name]

    def failed(self, client: str, *, unreachable: bool) -> None:
        """The server did not answer `client`, or said that it cannot."""
        if unreachable or self._clients.keys() - {client}:
            self._server.failed()
        else:
            self._server.abandoned()
        self._clients.setdefault(client, self._new()).failed()
        if len(self._clients) > _MOST_CLIENTS:
            self._clients.popitem(last=False)

    def abandoned(self, client: str) -> None:
        """The attempt ended without telling anything of the server: its client left."""
        self._server.abandoned()
        if client in self._clients:
            self._clients[client].abandoned()
