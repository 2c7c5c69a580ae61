"""The uncertainty of a measured share."""

import math

_Z_95 = 1.959963984540054


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a share (Wilson 1927), within [0, 1].

    Raises:
        ValueError: `trials` is not positive.
    """
    if trials <= 0:
        raise ValueError(f"trials must be positive, got {trials}")
    share, z2 = successes / trials, _Z_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    half = _Z_95 * spread / (1 + z2 / trials)
    return max(0.0, centre - half), min(1.0, centre + half)
