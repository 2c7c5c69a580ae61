"""The circuit breaker's states."""

from models.engines.remote.breaker import CircuitBreaker, Circuits
from tests.clock import Clock


def _breaker(clock: Clock) -> CircuitBreaker:
    return CircuitBreaker(failures=3, open_s=10, clock=clock)


def _fail(breaker: CircuitBreaker, times: int) -> None:
    for _ in range(times):
        assert breaker.admit()
        breaker.failed()


def test_opens_after_failures_in_a_row() -> None:
    """A success in between starts the count anew; the third failure in a row opens."""
    breaker = _breaker(Clock(100.0))
    _fail(breaker, 2)
    breaker.succeeded()
    _fail(breaker, 2)
    assert breaker.state == "closed"
    _fail(breaker, 1)
    assert (breaker.state, breaker.admit(), breaker.wait_s()) == ("open", False, 10)


def test_half_open_lets_one_attempt_through() -> None:
    """After the pause one attempt probes; its success closes, its failure opens for as long."""
    clock = Clock(100.0)
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
    clock = Clock(100.0)
    breaker = _breaker(clock)
    _fail(breaker, 3)
    clock.now_s += 11
    assert breaker.admit()
    breaker.abandoned()
    assert (breaker.state, breaker.admit()) == ("half-open", True)


def _circuits(clock: Clock) -> Circuits:
    return Circuits(failures=3, open_s=10, clock=clock)


def _try(circuits: Circuits, client: str, *, unreachable: bool = False) -> bool:
    """Fail at an attempt of `client`; return whether it might begin."""
    admitted = circuits.admit(client)
    if admitted:
        circuits.failed(client, unreachable=unreachable)
    return admitted


def test_nobody_opens_the_circuit_for_others() -> None:
    """One client's failures, however many and also as probes, are its own."""
    clock = Clock(100.0)
    circuits = _circuits(clock)
    for _ in range(10):
        assert _try(circuits, "hog") or circuits.wait_s("hog") == 10
        assert circuits.wait_s("other") == 0
    assert circuits.state == "open"
    for _ in range(5):
        clock.now_s += 10
        assert _try(circuits, "hog")
        assert not circuits.admit("hog")
        assert circuits.admit("other")
        circuits.succeeded("other")
    clock.now_s += 10
    assert circuits.admit("hog")
    circuits.succeeded("hog")
    assert circuits.state == "closed"


def test_failures_of_several_clients_are_the_servers() -> None:
    """As is one that nobody can connect to, whoever asks."""
    circuits = _circuits(Clock(100.0))
    assert [_try(circuits, name) for name in "abab"] == [True] * 4
    assert not circuits.admit("c")
    circuits = _circuits(Clock(100.0))
    assert [_try(circuits, "a", unreachable=True) for _ in range(3)] == [True] * 3
    assert not circuits.admit("c")


def test_who_fails_once_is_not_held_against_another_for_ever() -> None:
    """A success in between shows that the server answers."""
    circuits = _circuits(Clock(100.0))
    _try(circuits, "a")
    assert circuits.admit("b")
    circuits.succeeded("b")
    assert [_try(circuits, "c") for _ in range(4)] == [True, True, True, False]
    assert circuits.admit("b")


def test_clients_are_not_remembered_without_end() -> None:
    """Only failing ones are, and of these so many."""
    circuits = _circuits(Clock(100.0))
    for number in range(3000):
        circuits.failed(f"{number}", unreachable=False)
    assert len(circuits._clients) == 1024
