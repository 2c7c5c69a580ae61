"""Fusion weights from the members' own predictions: w_m ∝ prior_m · exp(l_m / T).

The prompt's log-likelihood l_m costs one more product with the language-model head, on hidden
states that prefill has computed anyway. Knows nothing of fusion rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from functools import cached_property

from models.engines.base import Evidence


@dataclass(frozen=True)
class LaneWeights:
    """A request's fusion weights, in the order of its lanes; they sum to one, as the `prior` does.

    `log_likelihood` is what each lane said of `num_tokens` tokens, in nats; empty before the first.
    """

    prior: tuple[float, ...]
    evidence: Evidence | None = None
    log_likelihood: tuple[float, ...] = ()
    num_tokens: int = 0

    @cached_property
    def values(self) -> tuple[float, ...]:
        """The weights by now."""
        if self.evidence is None or not self.num_tokens:
            return self.prior
        scale = self.evidence.temperature
        if self.evidence.per_token:
            scale *= self.num_tokens
        logs = [
            (math.log(weight) if weight > 0 else -math.inf) + value / scale
            for weight, value in zip(self.prior, self.log_likelihood, strict=True)
        ]
        highest = max(logs)
        raw = [math.exp(value - highest) for value in logs]
        return tuple(value / sum(raw) for value in raw)

    def heard(self, log_likelihood: Seq[float], num_tokens: int) -> LaneWeights:
        """Return the weights once each lane has said this of `num_tokens` more tokens."""
        so_far = self.log_likelihood or (0.0,) * len(self.prior)
        total = tuple(old + new for old, new in zip(so_far, log_likelihood, strict=True))
        return replace(self, log_likelihood=total, num_tokens=self.num_tokens + num_tokens)
