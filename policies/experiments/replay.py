"""Replay: what a policy would have earned on traffic of the past.

Two kinds of past. *Outcomes* hold every model's answer to every query, so any plan but a
fusion can be played out exactly. A *log* holds one answer per request, chosen by an
experiment's arms with known probabilities, so its estimates are off-policy. Requests that got no
rating are left out of quality, which assumes that rating does not depend on the arm.

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

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from policies.base import Policy, Query
from policies.cascade.base import Scorer
from policies.errors import ExperimentError, OutcomesError
from policies.evaluation.play import play
from policies.experiments.effects import Floats
from policies.footprint import Rates
from policies.outcomes import Outcome
from policies.plan import to_json

# Normal intervals around fewer effective requests than this say nothing.
MIN_EFFECTIVE = 30.0
# Of the reward model, each of which the others predict.
_NUM_FOLDS = 5
# Of 95% intervals.
_Z = NormalDist().inv_cdf(0.975)


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


def estimate(logged: Logged) -> OffPolicy:
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
    snips = float((w * logged.rewards).sum() / w.sum())
    return OffPolicy(
        ips=_mean(w * logged.rewards),
        # The ratio's delta-method residuals have mean zero.
        snips=_around(snips, w * (logged.rewards - snips) / w.mean()),
        dr=_mean(logged.q_target + w * (logged.rewards - logged.q_logged)),
        num_requests=num,
        num_effective=effective,
    )


def _mean(terms: Floats) -> Estimate:
    return _around(float(terms.mean()), terms - terms.mean())


def _around(value: float, residuals: Floats) -> Estimate:
    n = len(residuals)
    se = math.sqrt(np.square(residuals).sum() / (n * (n - 1))) if n > 1 else math.inf
    width = _Z * se
    return Estimate(value=value, low=value - width, high=value + width)


def fit_rewards(
    features_NF: Floats,
    actions: Sequence[str],
    rewards: Floats,
    *,
    targets: Sequence[str],
) -> tuple[Floats, Floats]:
    """Return q of the logged and of the target actions, each predicted by a fold that excludes it.

    One ridge regression per action over the features. An action that a fold has not seen is
    predicted by the fold's mean reward. Cross-fitting keeps DR's interval honest (Chernozhukov et
    al. 2018).
    """
    num = len(rewards)
    fold = np.arange(num) % _NUM_FOLDS
    action, target = np.array(actions), np.array(targets)
    x_NF = np.column_stack([np.ones(num), features_NF])
    ridge = np.eye(x_NF.shape[1])
    ridge[0, 0] = 0.0
    q_logged, q_target = np.zeros(num), np.zeros(num)
    for k in range(_NUM_FOLDS):
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


# Plans may differ from the log where limits or budgets trimmed them; more than this is a change.
_MOST_CHANGED = 0.01


@dataclass(frozen=True, kw_only=True)
class LoggedRequest:
    """One request of a log: who could have answered it, and what came of it.

    `chances` are the probabilities of the policies that the experiment could have sent it to, by
    policy name; `policy` is the one it took and `plan` the plan that ran. `score` is the user's
    rating in [0, 1], None without one.
    """

    query: Query
    chances: Mapping[str, float]
    policy: str
    plan: Mapping[str, object]
    usd: float
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class ReplayedPolicy:
    """What a policy is expected to earn. `usd` is per request; None where it cannot be known.

    `num_requests` counts those that quality is estimated from. From outcomes the estimates are
    exact plays of every query, and only sampling error is in the interval.
    """

    quality: Estimate
    usd: Estimate | None
    num_requests: int
    off_policy: OffPolicy | None = None


def replay_outcomes(
    outcomes: Sequence[Outcome],
    policy: Policy,
    *,
    rates: Mapping[str, Rates],
    scorers: Mapping[str, Scorer],
) -> ReplayedPolicy:
    """Play `policy` on every query of `outcomes`.

    Raises `ExperimentError` where its plan needs an answer that the outcomes lack: a fusion, a
    model without a score, or a judged answer's text.
    """
    try:
        played = [play(policy, one, rates=rates, scorers=scorers) for one in outcomes]
    except OutcomesError as error:
        raise ExperimentError(f"replay: {error}") from None
    scores, costs = [one.quality for one in played], [one.usd for one in played]
    known = [usd for usd in costs if usd is not None]
    return ReplayedPolicy(
        quality=_mean(np.array(scores)),
        usd=_mean(np.array(known)) if len(known) == len(costs) else None,
        num_requests=len(scores),
    )


def replay_log(
    log: Sequence[LoggedRequest], target: Policy, *, policies: Mapping[str, Policy]
) -> ReplayedPolicy:
    """Estimate what `target` would have earned on `log`, whose arms are among `policies`.

    Raises `ExperimentError` where support is missing, nobody rated, or the arms' policies no
    longer decide as they did.
    """
    num_changed = 0
    wanted, logged, propensities, agreement, supported = [], [], [], [], []
    for request in log:
        plans = {
            name: _key(to_json(policies[name].decide(request.query).plan))
            for name in request.chances
        }
        num_changed += plans[request.policy] != _key(request.plan)
        plan, choice = _key(request.plan), _key(to_json(target.decide(request.query).plan))
        chance = {
            key: sum(p for name, p in request.chances.items() if plans[name] == key)
            for key in (plan, choice)
        }
        wanted.append(choice)
        logged.append(plan)
        propensities.append(chance[plan])
        agreement.append(float(plan == choice))
        supported.append(chance[choice] > 0)
    if num_changed > _MOST_CHANGED * len(log):
        raise ExperimentError(
            f"replay: {num_changed} of {len(log)} logged requests would now get another plan from "
            "their own arm; replay with the policies that the log was made with"
        )
    # What limits or budgets had trimmed fits no policy's plan, and has no known propensity.
    kept = np.array(propensities) > 0
    rated = kept & np.array([request.score is not None for request in log], dtype=bool)
    features_NF = _features([request.query for request in log])

    def judge(rewards: Sequence[float], where: np.ndarray) -> OffPolicy:
        index = np.flatnonzero(where)
        actions, targets = ([keys[i] for i in index] for keys in (logged, wanted))
        reward_N = np.array(rewards)[index]
        q_logged, q_target = fit_rewards(features_NF[index], actions, reward_N, targets=targets)
        return estimate(
            Logged(
                rewards=reward_N,
                propensities=np.array(propensities)[index],
                agreement=np.array(agreement)[index],
                supported=np.array(supported)[index],
                q_logged=q_logged,
                q_target=q_target,
            )
        )

    if not rated.any():
        raise ExperimentError("replay: no logged request has feedback, so quality is unknown")
    quality = judge([request.score or 0.0 for request in log], rated)
    usd = judge([request.usd for request in log], kept)
    return ReplayedPolicy(
        quality=quality.dr, usd=usd.dr, num_requests=quality.num_requests, off_policy=quality
    )


def _features(queries: Sequence[Query]) -> np.ndarray:
    raw = np.array([[math.log1p(q.prompt_tokens), math.log1p(len(q.text))] for q in queries])
    spread = raw.std(0)
    scaled: np.ndarray = (raw - raw.mean(0)) / np.where(spread > 0, spread, 1.0)
    return scaled


def _key(plan: Mapping[str, object]) -> str:
    return json.dumps(plan, sort_keys=True)
