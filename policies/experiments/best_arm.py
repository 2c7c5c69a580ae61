"""Stops an experiment of many arms as soon as the best one is known, whenever one looks.

For the arm that leads, a, and each other one, b, the product of both arms' normal mixtures

    M = Π_{i in a, b} sqrt(ρ/(v_i + ρ)) exp(S_i²/(2 (v_i + ρ))),   S_i = v_i (mean_i - μ_i),

is a martingale under the true means μ, whichever arm units went to and why (as in Kaufmann &
Koolen 2021, "Mixture martingales revisited", over both arms at once). By Ville's inequality it
ever exceeds (K - 1)/δ with probability at most δ/(K - 1). So where even the smallest M over all
μ_a = μ_b (the nearest means at which b is not worse) exceeds that, b is not the best; and an arm
that beats all K - 1 others is the best with probability 1 - δ. Information v_i = 1/se_i² is
estimated, so the guarantee is that of large samples (`sequences`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from policies.experiments import sequences
from policies.experiments.effects import ArmMean


def known_best(
    means: Mapping[str, ArmMean], *, delta: float, smallest: float, increase: bool
) -> str | None:
    """Return the best arm once it is known at confidence 1 - `delta`, else None.

    `smallest` is the difference that would matter, for which ρ is tuned; `increase` says whether
    more is better.
    """
    if len(means) < 2 or any(not mean.se > 0 for mean in means.values()):
        return None
    sign = 1 if increase else -1
    leader = max(means, key=lambda name: sign * means[name].mean)
    rho = sequences.rho_for(smallest, alpha=delta / (len(means) - 1))
    needed = math.log((len(means) - 1) / delta)
    others = (means[name] for name in means if name != leader)
    return leader if all(_evidence(means[leader], b, rho) >= needed for b in others) else None


def _evidence(a: ArmMean, b: ArmMean, rho: float) -> float:
    """Return ln M at the equal means for which it is smallest."""
    information = [1 / mean.se**2 for mean in (a, b)]
    first, second = (v**2 / (v + rho) for v in information)
    gap = (a.mean - b.mean) ** 2 / 2 * first * second / (first + second)
    return gap - sum(math.log1p(v / rho) for v in information) / 2
