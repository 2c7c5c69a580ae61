"""A circuit breaker: leaves a server alone that fails, and finds out when it is back."""

from __future__ import annotations

from collections.abc import Callable

from models.engines.base import Circuit


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
