"""Fusion weights from the members' own predictions: w_m ∝ prior_m · exp(l_m / T).

The prompt's log-likelihood l_m costs one more product with the language-model head, on hidden
states that prefill has computed anyway. Knows nothing of fusion rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq

from models.engines.base import Evidence


class LaneWeights:
    """A request's fusion weights, in the order of its lanes; they sum to one."""

    def __init__(self, prior: Seq[float], evidence: Evidence | None = None) -> None:
        self.evidence = evidence
        self.values = tuple(prior)
        self._log_prior = [math.log(weight) if weight > 0 else -math.inf for weight in prior]
        self._log_likelihood = [0.0] * len(self.values)
        self._num_tokens = 0

    def add(self, log_likelihood: Seq[float], num_tokens: int) -> None:
        """Take in what each lane says of `num_tokens` more tokens, in nats."""
        assert self.evidence is not None
        self._num_tokens += num_tokens
        scale = self.evidence.temperature
        if self.evidence.per_token:
            scale *= self._num_tokens
        for lane, value in enumerate(log_likelihood):
            self._log_likelihood[lane] += value
        logs = [
            prior + value / scale
            for prior, value in zip(self._log_prior, self._log_likelihood, strict=True)
        ]
        highest = max(logs)
        raw = [math.exp(value - highest) for value in logs]
        self.values = tuple(value / sum(raw) for value in raw)
