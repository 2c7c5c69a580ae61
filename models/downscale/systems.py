"""Ways of answering, compared on the same test questions with paired bootstrap intervals.

A system is any way to get an answer: one model, a route to one of the chunks, a fusion, a merge.

Shapes: `Q` test questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_NUM_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class System:
    """`right_Q` is 1 where the answer is right; `parameters` are those that work on each token."""

    name: str
    kind: str
    right_Q: Floats
    parameters: float


class Comparison:
    """Bootstrap over questions, within each domain, the same resamples for every system."""

    def __init__(self, domain_Q: Sequence[str], *, seed: int) -> None:
        """`domain_Q` says which domain each test question is of; figures are means over domains."""
        self.domains = list(dict.fromkeys(domain_Q))
        domains = np.asarray(domain_Q)
        rng = np.random.default_rng(seed)
        self._weights_RQ = np.zeros((_NUM_RESAMPLES, len(domains)))
        self._plain_Q = np.zeros(len(domains))
        for domain in self.domains:
            rows = np.flatnonzero(domains == domain)
            share = 1 / (len(self.domains) * len(rows))
            self._plain_Q[rows] = share
            counts = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), _NUM_RESAMPLES)
            self._weights_RQ[:, rows] = counts * share

    def accuracy(self, right_Q: Floats) -> dict[str, Any]:
        """Mean over domains, with its 95% interval."""
        return self._figure(lambda weights: weights @ right_Q)

    def difference(self, right_Q: Floats, other_Q: Floats) -> dict[str, Any]:
        """How much more often right than another system, as a difference of accuracies."""
        return self._figure(lambda weights: weights @ (right_Q - other_Q))

    def ratio(self, right_Q: Floats, other_Q: Floats) -> dict[str, Any]:
        """The share of another system's accuracy that is kept."""
        return self._figure(
            lambda weights: (weights @ right_Q) / np.maximum(weights @ other_Q, 1e-12)
        )

    def _figure(self, statistic: Callable[[Floats], Any]) -> dict[str, Any]:
        low, high = np.quantile(statistic(self._weights_RQ), [0.025, 0.975])
        return {
            "value": round(float(statistic(self._plain_Q)), 4),
            "interval_95": [round(float(low), 4), round(float(high), 4)],
        }


def claims(
    systems: Mapping[str, System],
    comparison: Comparison,
    *,
    routed: Sequence[str],
    fused: Sequence[str],
    references: Sequence[str],
    curve: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """The three claims, each answered in numbers against each of `references`.

    (a) a routed chunk keeps at least 95% of the reference's accuracy; (b) a fused ensemble beats
    it; (c) the fused loss falls with n as the fitted law says, R² at least 0.9. A claim holds if
    its figure meets the bound, and holds surely if the whole interval does.
    """
    found: list[dict[str, Any]] = []
    for reference in references:
        other_Q = systems[reference].right_Q
        for name in routed:
            kept = comparison.ratio(systems[name].right_Q, other_Q)
            found.append(_claim("a", name, reference, kept, bound=0.95))
        for name in fused:
            gain = comparison.difference(systems[name].right_Q, other_Q)
            found.append(_claim("b", name, reference, gain, bound=0.0))
    r2 = curve.get("r2")
    falls = all(a > b for a, b in zip(curve["losses"], curve["losses"][1:], strict=False))
    holds = r2 is not None and r2 >= 0.9 and falls
    found.append(
        {"claim": "c", "system": "fused loss", "reference": "L(n) = L0 - b + b/n^a",
         "value": r2, "interval_95": None, "bound": 0.9, "holds": holds, "surely": holds}
    )  # fmt: skip
    return found


def _claim(
    claim: str, system: str, reference: str, figure: Mapping[str, Any], *, bound: float
) -> dict[str, Any]:
    low = figure["interval_95"][0]
    strict = claim == "b"
    value = figure["value"]
    return {
        "claim": claim,
        "system": system,
        "reference": reference,
        **figure,
        "bound": bound,
        "holds": value > bound if strict else value >= bound,
        "surely": low > bound if strict else low >= bound,
    }
