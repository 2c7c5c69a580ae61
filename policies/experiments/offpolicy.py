"""Off-policy estimates: what a policy would have earned on traffic that others decided.

Logged requests x_i had action a_i (a plan) with propensity p_i, and reward r_i. The target policy
takes its own action with probability π(a | x). With weights w_i = π(a_i | x_i) / p_i and a reward
model q(x, a):

    IPS    mean(w r)                                      (Horvitz & Thompson 1952)
    SNIPS  Σ w r / Σ w                                    (Swaminathan & Joachims 2015)
    DR     mean(q(x, π) + w (r - q(x, a)))                (Dudík, Langford & Li 2011)

DR is unbiased if either the propensities or the reward model are right. None of them can know
anything of actions that the log never tries: such a question is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from policies.errors import ExperimentError
from policies.experiments.effects import Floats

# Normal intervals around fewer effective requests than this say nothing.
MIN_EFFECTIVE = 30.0


@dataclass(frozen=True, kw_only=True)
class Logged:
    """N logged requests under one target policy.

    `rewards`, `propensities` (of the logged actions, in (0, 1]) and `agreement` (the target's
    probability of the logged action, 1 or 0 for a deterministic one) are [N]. `supported` says
    where the log could have taken every action that the target may take. `q_logged` and
    `q_target` are the reward model's predictions for the logged action and under the target.
    """

    rewards: Floats
    propensities: Floats
    agreement: Floats
    supported: NDArray[np.bool_]
    q_logged: Floats
    q_target: Floats


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its normal interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class OffPolicy:
    """The three estimates of the target's mean reward.

    `num_effective` = (Σ w)²/Σ w² is how many on-policy requests the log is worth (Kish).
    """

    ips: Estimate
    snips: Estimate
    dr: Estimate
    num_requests: int
    num_effective: float


def estimate(logged: Logged, *, confidence: float = 0.95) -> OffPolicy:
    """Estimate the target's mean reward; raises `ExperimentError` where support is missing."""
    num = len(logged.rewards)
    missing = int(np.count_nonzero(~logged.supported))
    if missing:
        raise ExperimentError(
            f"replay: {missing} of {num} requests would get a plan that the log never tries for "
            "them, so nothing is known of it there; run an experiment that includes it"
        )
    if num and not (np.all(logged.propensities > 0) and np.all(logged.propensities <= 1)):
        raise ExperimentError("replay: some logged propensities are not in (0, 1]")
    w = logged.agreement / logged.propensities
    effective = float(w.sum() ** 2 / np.square(w).sum()) if np.any(w) else 0.0
    if effective < MIN_EFFECTIVE:
        raise ExperimentError(
            f"replay: {num} requests are worth only {effective:.1f} under this policy; "
            f"at least {MIN_EFFECTIVE:.0f} are needed"
        )
    z = float(norm.isf((1 - confidence) / 2))
    snips = float((w * logged.rewards).sum() / w.sum())
    return OffPolicy(
        ips=_mean(w * logged.rewards, z),
        # The ratio's delta-method residuals have mean zero.
        snips=_around(snips, w * (logged.rewards - snips) / w.mean(), z),
        dr=_mean(logged.q_target + w * (logged.rewards - logged.q_logged), z),
        num_requests=num,
        num_effective=effective,
    )


def _mean(terms: Floats, z: float) -> Estimate:
    return _around(float(terms.mean()), terms - terms.mean(), z)


def _around(value: float, residuals: Floats, z: float) -> Estimate:
    n = len(residuals)
    width = z * float(np.sqrt(np.square(residuals).sum() / (n * (n - 1))))
    return Estimate(value=value, low=value - width, high=value + width)


def fit_rewards(
    features_NF: Floats,
    actions: Sequence[str],
    rewards: Floats,
    *,
    targets: Sequence[str],
    num_folds: int = 5,
    penalty: float = 1.0,
) -> tuple[Floats, Floats]:
    """Return q of the logged and of the target actions, each predicted by a fold that excludes it.

    One ridge regression per action over the features. An action that a fold has not seen is
    predicted by the fold's mean reward. Cross-fitting keeps DR's interval honest (Chernozhukov et
    al. 2018).
    """
    num = len(rewards)
    fold = np.arange(num) % num_folds
    action, target = np.array(actions), np.array(targets)
    x_NF = np.column_stack([np.ones(num), features_NF])
    ridge = penalty * np.eye(x_NF.shape[1])
    ridge[0, 0] = 0.0
    q_logged, q_target = np.zeros(num), np.zeros(num)
    for k in range(num_folds):
        train, test = fold != k, fold == k
        for name in np.unique(np.concatenate([action[test], target[test]])):
            seen = train & (action == name)
            if seen.any():
                x = x_NF[seen]
                beta = np.linalg.lstsq(x.T @ x + ridge, x.T @ rewards[seen], rcond=None)[0]
                predicted = x_NF @ beta
            else:
                predicted = np.full(num, rewards[train].mean() if train.any() else 0.0)
            q_logged = np.where(test & (action == name), predicted, q_logged)
            q_target = np.where(test & (target == name), predicted, q_target)
    return q_logged, q_target
