"""What a scorer looks at beside n-grams: the free signals of an attempt, as numbers.

The same functions serve training and requests, so that both see the same features.
"""

from __future__ import annotations

import math

from policies.cascade.base import Attempt, normalise

# The last two depend on the stages before; see `agreement`.
DENSE_SIGNALS = (
    "prior_logit",
    "logprob_mean",
    "logprob_min",
    "logprob_sum",
    "probability_mean",
    "probability_min",
    "entropy_mean",
    "log_num_tokens",
    "log_query_length",
    "log_answer_length",
    "has_earlier",
    "agreement",
)
NUM_OWN_SIGNALS = len(DENSE_SIGNALS) - 2

# What the pairwise ranker compares; see `rank_signals`.
RANK_SIGNALS = ("score_logit", "support", "logprob_mean", "logprob_min", "log_answer_length")


def own_signals(attempt: Attempt, prior: float) -> list[float]:
    """Return the signals of `attempt` itself, in the order of `DENSE_SIGNALS`, all but two.

    `prior` is P(correct | query). Log-probabilities are cut at -20 so that one impossible token
    cannot drown the rest. An entropy that nobody knows is taken to be the mean surprise, of which
    it is the expectation.
    """
    mean = max(attempt.logprob_mean, -20.0)
    lowest = max(attempt.logprob_min, -20.0)
    return [
        logit(prior),
        mean,
        lowest,
        max(mean * attempt.num_tokens, -50.0),
        math.exp(min(mean, 0.0)),
        math.exp(min(lowest, 0.0)),
        -mean if attempt.entropy_mean is None else min(attempt.entropy_mean, 20.0),
        math.log1p(attempt.num_tokens),
        math.log1p(len(attempt.query)),
        math.log1p(len(attempt.answer)),
    ]


def falling_signals(attempt: Attempt, prior: float) -> list[float]:
    """Return a constant, the prior's logit, and what only falls while an answer grows.

    That is the sum and the least of its log-probabilities; see `policies.cascade.stopping`.
    """
    total = max(attempt.logprob_mean * attempt.num_tokens, -50.0) if attempt.num_tokens else 0.0
    return [1.0, logit(prior), total, max(attempt.logprob_min, -20.0)]


def agreement(attempt: Attempt) -> list[float]:
    """Return whether earlier stages answered, and the share of them that gave the same answer."""
    if not attempt.earlier:
        return [0.0, 0.0]
    mine = normalise(attempt.answer)
    same = sum(normalise(other) == mine for other in attempt.earlier)
    return [1.0, same / len(attempt.earlier)]


def rank_signals(attempt: Attempt, score: float, support: float) -> list[float]:
    """Return what the ranker compares, in the order of `RANK_SIGNALS`.

    `score` is the scorer's, as if no other had answered; `support` the share of the other
    candidates that gave the same answer.
    """
    return [
        logit(score),
        support,
        max(attempt.logprob_mean, -20.0),
        max(attempt.logprob_min, -20.0),
        math.log1p(len(attempt.answer)),
    ]


def logit(probability: float) -> float:
    """Return log(p / (1 - p)), with p kept a millionth away from 0 and 1."""
    kept = min(max(probability, 1e-6), 1 - 1e-6)
    return math.log(kept / (1 - kept))


def sigmoid(value: float) -> float:
    """Return 1 / (1 + exp(-value)), without overflow."""
    return 0.5 * (1 + math.tanh(0.5 * value))
