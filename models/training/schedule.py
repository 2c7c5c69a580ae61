"""Warm-up, stable, decay: the learning rate as a share of its peak.

The stable part does not depend on the length of the run, so a finished run can be lengthened
from the checkpoint kept at the start of its decay.
"""


def learning_rate_share(
    step: int, *, num_steps: int, num_warmup_steps: int, num_decay_steps: int
) -> float:
    """Share of the peak rate in (0, 1] at `step` (counted from 0): linear up, flat, linear down."""
    warm = min(1.0, (step + 1) / num_warmup_steps) if num_warmup_steps else 1.0
    decay = min(1.0, (num_steps - step) / num_decay_steps) if num_decay_steps else 1.0
    return min(warm, decay)
