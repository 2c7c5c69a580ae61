"""Warm-up, stable, decay."""

from models.training.loop import Settings, learning_rate_share


def _shares(num_steps: int) -> list[float]:
    settings = Settings(num_steps=num_steps, num_warmup_steps=4, num_decay_steps=5)
    return [learning_rate_share(step, settings) for step in range(num_steps)]


def test_it_rises_stays_and_falls() -> None:
    """The rate climbs linearly to its peak, stays there and ends just above zero."""
    assert _shares(12) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]


def test_a_longer_run_begins_alike() -> None:
    """Before the decay, the rate does not depend on the length of the run."""
    assert _shares(12)[:8] == _shares(40)[:8]


def test_no_warmup_and_no_decay() -> None:
    """Both ends may be left out."""
    settings = Settings(num_steps=1, num_warmup_steps=0, num_decay_steps=0)
    assert learning_rate_share(0, settings) == 1
