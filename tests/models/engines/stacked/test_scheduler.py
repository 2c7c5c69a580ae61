"""Who runs in a step when one client asks for very much."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.engines.stacked.cache import Arena
from models.engines.stacked.scheduler import Scheduler
from models.engines.stacked.sequence import Sequence
from tests.models.engines.stacked.tiny import make_sequence

NUM_ROWS = 4096


@pytest.fixture
def scheduler() -> Scheduler:
    """A scheduler with room for some hundred answers."""
    shape: Any = SimpleNamespace(num_layers=1, num_kv_heads=1, head_dim=1)
    arena = Arena(shape, NUM_ROWS * 8, torch.device("cpu"), torch.float32)
    assert arena.num_rows == NUM_ROWS
    return Scheduler(arena, step_rows=512)


def add(
    scheduler: Scheduler,
    client: str,
    *,
    num_tokens: int,
    offline: bool = False,
    weight: float = 1.0,
    user: str = "",
) -> Sequence:
    """Add a request of a short prompt and `num_tokens` tokens to come."""
    sequence = make_sequence([5, 6], (0,))
    sequence.request = replace(
        sequence.request, client_id=client, offline=offline, client_weight=weight, user=user
    )
    sequence.max_new_tokens = num_tokens
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler) -> dict[str, int]:
    """Run a step in which every one draws a token; return each client's rows in it."""
    rows: dict[str, int] = {}
    for part in scheduler.next_step():
        sequence = part.sequence
        client = sequence.request.client_id
        rows[client] = rows.get(client, 0) + part.num_rows
        samples = part.drafts
        sequence.num_cached += part.num_tokens
        if samples:
            sequence.tokens.append(7)
            if sequence.num_generated == sequence.max_new_tokens:
                scheduler.remove(sequence)
    return rows


def test_many_choices_of_one_client_do_not_starve_another(scheduler: Scheduler) -> None:
    """Beside three requests of 128 choices a small one is done in as many steps as alone.

    It finds room at once, takes part in every step, and the steps are about as short as its own.
    """
    greedy = [add(scheduler, "greedy", num_tokens=30) for _ in range(3 * 128)]
    for _ in range(3):
        assert step(scheduler).keys() == {"greedy"}
    modest = add(scheduler, "modest", num_tokens=5)
    assert modest.region_start is not None, "some of the cache is left to others"
    for _ in range(5):
        rows = step(scheduler)
        assert rows["modest"] >= 1
        assert rows["greedy"] <= 16
    assert modest.num_generated == 5
    assert step(scheduler)["greedy"] > 16, "alone again, it has all"
    counts = [sequence.num_generated for sequence in greedy if sequence.region_start is not None]
    assert max(counts) - min(counts) <= 1, "its own requests move on alike"


def test_a_client_of_more_weight_gets_more(scheduler: Scheduler) -> None:
    """Where all rows of a step are wanted it has as many times more of them."""
    for _ in range(128):
        add(scheduler, "light", num_tokens=10)
        add(scheduler, "heavy", num_tokens=10, weight=4)
    step(scheduler)
    assert step(scheduler) == {"light": 32, "heavy": 128}


def test_turns_go_by_weight(scheduler: Scheduler) -> None:
    """Where there is room for few, four times the weight is let in four times as often."""
    holder = add(scheduler, "first", num_tokens=NUM_ROWS - 1)
    waiting = [
        add(scheduler, client, num_tokens=NUM_ROWS // 16 - 2, weight=weight)
        for client, weight in (("light", 1), ("heavy", 4))
        for _ in range(20)
    ]
    scheduler.remove(holder)
    running = [s.request.client_id for s in waiting if s.region_start is not None]
    assert 3 <= running.count("heavy") / running.count("light") <= 5


def test_made_up_users_get_no_turns_of_their_own(scheduler: Scheduler) -> None:
    """Of a client that names another user in each request another's requests notice nothing."""
    for number in range(3 * 128):
        add(scheduler, "greedy", num_tokens=30, user=f"user {number}")
    for _ in range(3):
        step(scheduler)
    modest = [add(scheduler, "modest", num_tokens=5) for _ in range(2)]
    for _ in range(5):
        rows = step(scheduler)
        assert rows["modest"] >= 2
        assert rows["greedy"] <= 16
    assert all(sequence.num_generated == 5 for sequence in modest)
    add(scheduler, "modest", num_tokens=NUM_ROWS)
    add(scheduler, "modest", num_tokens=NUM_ROWS)
    assert scheduler.surplus.request.client_id == "greedy"


def test_users_divide_what_their_client_gets(scheduler: Scheduler) -> None:
    """Of 384 requests of one user of a key one has to end, then another user has a small one done.

    The steps are about as short as its own meanwhile.
    """
    greedy = [add(scheduler, "app", num_tokens=30, user="greedy") for _ in range(3 * 128)]
    for _ in range(3):
        step(scheduler)
    modest = add(scheduler, "app", num_tokens=5, user="modest")
    scheduler.remove(greedy[0])
    assert modest.region_start is not None, "who has had least is admitted next"
    for _ in range(5):
        assert step(scheduler)["app"] <= 16 + 8, "sixteen that decode, and short prompts"
    assert modest.num_generated == 5
    assert step(scheduler)["app"] > 16 + 8, "alone again, the other has all"


def test_a_client_alone_may_take_all(scheduler: Scheduler) -> None:
    """A request as large as the cache runs where nobody else does, and everything ends."""
    large = add(scheduler, "greedy", num_tokens=NUM_ROWS - 1)
    assert large.region_start is not None
    scheduler.remove(large)
    sequences = [add(scheduler, name, num_tokens=9) for name in "aab" for _ in range(300)]
    for _ in range(2000):
        if not step(scheduler):
            break
    assert all(sequence.num_generated == 9 for sequence in sequences)


def test_who_has_most_waiting_goes_first(scheduler: Scheduler) -> None:
    """Where the queue is full it is the client with the longest one that is refused."""
    for _ in range(300):
        add(scheduler, "greedy", num_tokens=30)
    add(scheduler, "modest", num_tokens=NUM_ROWS)
    assert scheduler.surplus.request.client_id == "greedy"


def test_offline_work_comes_after_all_others(scheduler: Scheduler) -> None:
    """What nobody waits for is admitted after who came later, and prefilled after them."""
    holder = add(scheduler, "first", num_tokens=NUM_ROWS - 1)
    batch = add(scheduler, "batch", num_tokens=NUM_ROWS - 1, offline=True)
    modest = add(scheduler, "modest", num_tokens=NUM_ROWS // 2)
    assert {batch.region_start, modest.region_start} == {None}, "there is no room"
    scheduler.remove(holder)
    assert modest.region_start is not None
    assert batch.region_start is None
    scheduler.remove(modest)
    assert batch.region_start is not None, "alone, it has all"
