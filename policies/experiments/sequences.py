"""Always-valid inference: intervals and p-values that hold at every look at once.

The two-sided normal-mixture confidence sequence (Robbins 1970; Howard, Ramdas, McAuliffe &
Sekhon 2021, "Time-uniform, nonparametric, nonasymptotic confidence sequences", equation 14): for
a martingale S with variance process v, with probability at least 1 - α, at all times,

    |S| ≤ sqrt((v + ρ) (ln(1 + v/ρ) + 2 ln(1/α))).

An effect's estimate with standard error se carries the information v = 1/se² and the score
S = estimate/se²; in large samples (v, S) behaves like that martingale (Waudby-Smith, Arbour,
Sinha, Kennedy & Ramdas 2024, "Time-uniform central limit theory and asymptotic confidence
sequences"), so one may look after every request and stop at will. All functions take and return
floats or arrays alike.

An experiment of many arms stops as soon as the best one is known (`known_best`). For the arm that
leads, a, and each other one, b, the product of both arms' normal mixtures

    M = Π_{i in a, b} sqrt(ρ/(v_i + ρ)) exp(S_i²/(2 (v_i + ρ))),   S_i = v_i (mean_i - μ_i),

is a martingale under the true means μ, whichever arm units went to and why (as in Kaufmann &
Koolen 2021, "Mixture martingales revisited", over both arms at once). By Ville's inequality it
ever exceeds (K - 1)/δ with probability at most δ/(K - 1). So where even the smallest M over all
μ_a = μ_b (the nearest means at which b is not worse) exceeds that, b is not the best; and an arm
that beats all K - 1 others is the best with probability 1 - δ. Information v_i = 1/se_i² is
estimated, so the guarantee is that of large samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from policies.experiments.effects import ArmMean

Values = TypeVar("Values", float, NDArray[np.float64])

_NORMAL = NormalDist()


def tuned_rho(v: Values, *, alpha: float) -> Values:
    """Return the ρ > 0 for which the sequence is about tightest at variance `v`."""
    log = 2 * np.log(1 / alpha)
    return cast(Values, v / (log + np.log1p(log)))


def boundary(v: Values, *, rho: Values, alpha: float) -> Values:
    """Return how far |S| may stray at variance `v` before a true null is rejected."""
    return cast(Values, np.sqrt((v + rho) * (np.log1p(v / rho) + 2 * np.log(1 / alpha))))


def radius(se: Values, *, rho: Values, alpha: float) -> Values:
    """Return the half-width of the interval around an estimate with standard error `se`.

    Infinite where `se` is zero or unknown: no spread seen yet says nothing about the effect.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        v = 1 / np.square(se)
        width = boundary(v, rho=rho, alpha=alpha) / v
    return cast(Values, np.where(np.isfinite(v) & (se > 0), width, np.inf)[()])


def p_value(estimate: Values, se: Values, *, rho: Values) -> Values:
    """Return the always-valid p of "no effect": min(1, 1/M), M the mixture likelihood ratio.

    M = sqrt(ρ/(v+ρ)) exp(S²/(2(v+ρ))). It falls below α exactly when the interval leaves zero.
    """
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        v = 1 / np.square(se)
        s = estimate * v
        log_m = 0.5 * np.log(rho / (v + rho)) + np.square(s) / (2 * (v + rho))
        p = np.exp(-np.maximum(log_m, 0))
    return cast(Values, np.where(np.isfinite(v) & (se > 0), p, 1.0)[()])


def information_for(effect: Values, *, alpha: float, power: float = 0.9) -> Values:
    """Return the information 1/se² at which a fixed-sample test finds `effect` with `power`."""
    z = _NORMAL.inv_cdf(power) - _NORMAL.inv_cdf(alpha / 2)
    return cast(Values, np.square(z / effect))


def rho_for(effect: Values, *, alpha: float) -> Values:
    """Return the ρ of a sequence that is to find `effect`: tuned where a fixed test would."""
    return tuned_rho(information_for(effect, alpha=alpha), alpha=alpha)


def power_at(effect: float, se: float, *, rho: float, alpha: float) -> float:
    """Return the probability that the interval at this `se` would exclude zero under `effect`.

    The sequence's own power is higher: it may have crossed earlier.
    """
    width = radius(se, rho=rho, alpha=alpha)
    return _NORMAL.cdf((abs(effect) - width) / se) if np.isfinite(width) else 0.0


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
    rho = rho_for(smallest, alpha=delta / (len(means) - 1))
    needed = math.log((len(means) - 1) / delta)
    others = (means[name] for name in means if name != leader)
    return leader if all(_evidence(means[leader], b, rho) >= needed for b in others) else None


def _evidence(a: ArmMean, b: ArmMean, rho: float) -> float:
    """Return ln M at the equal means for which it is smallest."""
    information = [1 / mean.se**2 for mean in (a, b)]
    first, second = (v**2 / (v + rho) for v in information)
    gap = (a.mean - b.mean) ** 2 / 2 * first * second / (first + second)
    return gap - sum(math.log1p(v / rho) for v in information) / 2
