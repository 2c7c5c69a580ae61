"""Scorers: P(correct | query, answer), on which cascades decide whether to stop."""

from __future__ import annotations

import math
from typing import Protocol

from models.engines.base import Chunk
from policies.base import Query


class Scorer(Protocol):
    """Judges a whole answer. Fast, thread-safe, free of I/O."""

    def score(self, query: Query, answer: Chunk) -> float:
        """Return P(correct) in [0, 1] of `answer`, all its chunks merged into one."""
        ...


class Confidence:
    """The geometric mean of the answer's token probabilities; needs no training.

    exp(mean log p), the length-normalised likelihood; an empty answer scores 0.
    """

    def score(self, query: Query, answer: Chunk) -> float:  # noqa: ARG002 - the contract
        """Return the geometric mean probability of `answer`'s tokens."""
        if not answer.tokens:
            return 0.0
        mean = math.fsum(token.logprob for token in answer.tokens) / len(answer.tokens)
        return math.exp(min(mean, 0.0))
