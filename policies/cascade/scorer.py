"""The learned scorer: calibrated logistic models of P(correct | query, answer).

One model per stage (FrugalGPT trains one per member), and one over all stages for plans it has
not seen. It looks at signals that an answer brings along for nothing. Trained by
`policies.cascade.fit`; a request needs NumPy and SciPy alone.

Shape legend: S stages plus one for all of them, F dense signals, N n-gram features of a query,
A of an answer, P falling signals, K thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from policies.cascade.base import Attempt, normalise
from policies.encoders.ngrams import NGrams
from policies.errors import PolicyError
from policies.files import check_shape
from policies.plan import Answer, Plan

Floats = NDArray[np.float64]

ANY_STAGE: Final = "*"

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

NUM_FALLING: Final = 4
THRESHOLDS_K: Final[Floats] = np.arange(1, 100) / 100

_ARRAYS = (
    "prior_SN",
    "prior_bias_S",
    "dense_SF",
    "answer_SA",
    "bias_S",
    "slope_S",
    "offset_S",
    "rank_P",
    "falling_SP",
    "cut_SK",
)


@dataclass(frozen=True, kw_only=True)
class ScorerWeights:
    """What training leaves: `stages` names the rows, the last of which is `ANY_STAGE`.

    The prior is sigmoid(prior_bias + prior_SN · query n-grams); the score is
    sigmoid(slope · (bias + dense_SF · signals + answer_SA · answer n-grams) + offset), where slope
    and offset are Platt's scaling on answers that the model was not trained on. Of two answers the
    first is the better one with probability sigmoid(rank_P · (its rank signals - the other's)).
    `falling_SP` and `cut_SK` bound the score of an answer from its beginning.
    """

    stages: tuple[str, ...]
    query_encoder: NGrams
    answer_encoder: NGrams
    prior_SN: NDArray[np.float32]
    prior_bias_S: Floats
    dense_SF: Floats
    answer_SA: NDArray[np.float32]
    bias_S: Floats
    slope_S: Floats
    offset_S: Floats
    rank_P: Floats
    falling_SP: Floats
    cut_SK: Floats

    def __post_init__(self) -> None:
        num_stages = len(self.stages)
        if not self.stages or self.stages[-1] != ANY_STAGE:
            raise PolicyError(f"scorer: the last of its stages must be {ANY_STAGE!r}")
        shapes = {
            "prior_SN": (num_stages, self.query_encoder.num_features),
            "dense_SF": (num_stages, len(DENSE_SIGNALS)),
            "answer_SA": (num_stages, self.answer_encoder.num_features),
            "rank_P": (len(RANK_SIGNALS),),
            "falling_SP": (num_stages, NUM_FALLING),
            "cut_SK": (num_stages, THRESHOLDS_K.size),
        }
        for name in _ARRAYS:
            expected = shapes.get(name, (num_stages,))
            check_shape(name, getattr(self, name), expected)

    def settings(self) -> dict[str, Any]:
        """Return what is not an array, as JSON data."""
        return {
            "stages": list(self.stages),
            "query_encoder": self.query_encoder.settings(),
            "answer_encoder": self.answer_encoder.settings(),
        }

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays by name, for storing."""
        return {
            **{name: getattr(self, name) for name in _ARRAYS},
            **{f"query.{name}": array for name, array in self.query_encoder.arrays().items()},
            **{f"answer.{name}": array for name, array in self.answer_encoder.arrays().items()},
        }


def restore_weights(
    settings: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> ScorerWeights:
    """Read what `settings` and `arrays` returned.

    Raises `KeyError`, `TypeError` or `PolicyError` for what is missing or does not fit.
    """
    return ScorerWeights(
        stages=tuple(settings["stages"]),
        query_encoder=NGrams(**settings["query_encoder"]).restore(_under("query.", arrays)),
        answer_encoder=NGrams(**settings["answer_encoder"]).restore(_under("answer.", arrays)),
        **{name: arrays[name] for name in _ARRAYS},
    )


def _under(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


class LearnedScorer:
    """Evaluates `ScorerWeights`; thread-safe, well under a millisecond per answer.

    `plans` says which plan each stage's name stands for; of the fusions in `top` so many members
    run, which depends on the query.
    """

    def __init__(
        self,
        weights: ScorerWeights,
        plans: Mapping[str, Plan],
        top: Mapping[str, int] = MappingProxyType({}),
    ) -> None:
        self._weights = weights
        self._rows = {name: row for row, name in enumerate(weights.stages)}
        self._row_of_plan = {
            plan: self._rows[name] for name, plan in plans.items() if name not in top
        }
        self._row_of_fusion = {
            _fusion(plans[name], size): self._rows[name] for name, size in top.items()
        }

    def priors(self, query: str) -> dict[str, float]:
        """Return P(correct | query) of every stage, before any answer."""
        logits = self._prior_logits(query)
        return {name: float(expit(logits[row])) for name, row in self._rows.items()}

    def score(self, attempt: Attempt) -> float:
        """Return P(correct | query, answer) of `attempt` in [0, 1]."""
        weights = self._weights
        row = self._row(attempt.plan)
        prior = float(expit(self._prior_logits(attempt.query)[row]))
        signals = np.array([*own_signals(attempt, prior), *agreement(attempt)])
        ngrams = weights.answer_encoder.features(attempt.answer)
        raw = (
            weights.bias_S[row]
            + weights.dense_SF[row] @ signals
            + weights.answer_SA[row, ngrams.ids] @ ngrams.values
        )
        return float(expit(weights.slope_S[row] * raw + weights.offset_S[row]))

    def ceiling(self, prefix: Attempt, max_tokens: int) -> float:  # noqa: ARG002 - no need of it
        """Return a threshold that the whole answer's score will not reach.

        Of the answers that would reach it, at most 1% are ever said not to
        (`policies.cascade.fit.fit_stopping`).
        """
        weights, row = self._weights, self._row(prefix.plan)
        prior = float(expit(self._prior_logits(prefix.query)[row]))
        estimate = weights.falling_SP[row] @ np.array(falling_signals(prefix, prior))
        passed = int(np.searchsorted(weights.cut_SK[row], estimate, side="right"))
        return float(THRESHOLDS_K[passed]) if passed < THRESHOLDS_K.size else 1.0

    def rank(self, attempts: Sequence[Attempt]) -> list[float]:
        """Return the share of its pairs that each attempt is expected to win, 1 for a single one.

        Bradley and Terry's model on the difference of the attempts' signals.
        """
        if len(attempts) == 1:
            return [1.0]
        texts = [normalise(attempt.answer) for attempt in attempts]
        signals = [
            rank_signals(
                attempt,
                self.score(replace(attempt, earlier=())),
                (texts.count(text) - 1) / (len(texts) - 1),
            )
            for attempt, text in zip(attempts, texts, strict=True)
        ]
        worth = np.array(signals) @ self._weights.rank_P
        wins = expit(worth[:, None] - worth[None, :])
        # Against itself each attempt "wins" a half, which doesn't count.
        shares: list[float] = ((wins.sum(axis=1) - 0.5) / (len(attempts) - 1)).tolist()
        return shares

    def _row(self, plan: Plan) -> int:
        row = self._row_of_plan.get(plan)
        if row is None and isinstance(plan, Answer):
            row = self._row_of_fusion.get(_fusion(plan, len(plan.members)))
        return len(self._weights.stages) - 1 if row is None else row

    def _prior_logits(self, query: str) -> Floats:
        weights = self._weights
        ngrams = weights.query_encoder.features(query)
        logits: Floats = weights.prior_SN[:, ngrams.ids] @ ngrams.values + weights.prior_bias_S
        return logits


def _fusion(plan: Plan, size: int) -> tuple[int, Answer]:
    """Return what fusions of `size` members, whichever they are, have in common."""
    assert isinstance(plan, Answer)
    return size, replace(plan, members=("any",), weights=None)


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

    That is the sum and the least of its log-probabilities; see `policies.cascade.fit.fit_stopping`.
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
