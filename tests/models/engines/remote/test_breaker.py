"""The circuit breaker's states."""

from models.engines.remote.engine import CircuitBreaker


class _Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def _breaker(clock: _Clock) -> CircuitBreaker:
    return CircuitBreaker(failures=3, open_s=10, clock=clock)


def _fail(breaker: CircuitBreaker, times: int) -> None:
    for _ in range(times):
        assert breaker.admit()
        breaker.failed()


def test_opens_after_failures_in_a_row() -> None:
    """A success in between starts the count anew; the third failure in a row opens."""
    breaker = _breaker(_Clock())
    _fail(breaker, 2)
    breaker.succeeded()
    _fail(breaker, 2)
    assert breaker.state == "closed"
    _fail(breaker, 1)
    assert (breaker.state, breaker.admit(), breaker.wait_s()) == ("open", False, 10)


def test_half_open_lets_one_attempt_through() -> None:
    """After the pause one attempt probes; its success closes, its failure opens for as long."""
    clock = _Clock()
    breaker = _breaker(clock)
    _fail(breaker, 3)
    clock.now_s += 10
    assert breaker.state == "half-open"
    assert [breaker.admit(), breaker.admit()] == [True, False]
    breaker.failed()
    assert (breaker.state, breaker.wait_s()) == ("open", 10)
    clock.now_s += 10
    assert breaker.admit()
    breaker.succeeded()
    assert (breaker.state, breaker.admit()) == ("closed", True)


def test_an_abandoned_probe_makes_room_for_the_next() -> None:
    """A probe whose client left tells nothing: the next request probes."""
    clock = _Clock()
    breaker = _breaker(clock)
    _fail(breaker, 3)
    clock.now_s += 11
    assert breaker.admit()
    breaker.abandoned()
    assert (breaker.state, breaker.admit()) == ("half-open", True)
