"""Sample-ratio mismatch: do the arms hold as many units as they should?

If not, units went missing or were misassigned, groups are not comparable, and no difference
between them may be believed (Fabijan et al. 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import chi2

ALARM_P = 0.001


@dataclass(frozen=True, kw_only=True)
class SampleRatio:
    """Units seen and expected per arm, and χ²'s p for their difference."""

    arms: tuple[str, ...]
    observed: tuple[int, ...]
    expected: tuple[float, ...]
    p: float

    @property
    def alarm(self) -> bool:
        """Whether the mismatch is too large for chance (p < 0.001)."""
        return self.p < ALARM_P


def sample_ratio(
    arms: Sequence[str], observed: Sequence[int], expected: Sequence[float]
) -> SampleRatio:
    """Compare `observed` units with relative `expected` shares (arms with share 0 left out)."""
    kept = [i for i, share in enumerate(expected) if share > 0]
    total, shares = sum(observed[i] for i in kept), sum(expected[i] for i in kept)
    wanted = [total * expected[i] / shares for i in kept] if shares else []
    statistic = sum(
        (observed[i] - want) ** 2 / want for i, want in zip(kept, wanted, strict=True) if want
    )
    return SampleRatio(
        arms=tuple(arms[i] for i in kept),
        observed=tuple(observed[i] for i in kept),
        expected=tuple(wanted),
        p=float(chi2.sf(statistic, len(kept) - 1)) if total and len(kept) > 1 else 1.0,
    )
