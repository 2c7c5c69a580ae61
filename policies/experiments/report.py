"""What may be said of an experiment now: the report's data and how it reads as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from policies.experiments.effects import ArmMean
from policies.experiments.mismatch import SampleRatio

Verdict: TypeAlias = Literal["blocked", "too_early", "ship", "keep_control", "continue"]


@dataclass(frozen=True, kw_only=True)
class ArmReport:
    """One arm: its units, requests and the mean of every metric that has values."""

    name: str
    policy: str
    num_units: int
    num_requests: int
    means: dict[str, ArmMean]
    stopped: bool = False


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One arm against the control on one metric.

    [`low`, `high`] holds the true difference at every look at once, together with the intervals
    of its family, with probability 1 - alpha. `p` is always valid and corrected for the family's
    size (Bonferroni). `better` is None while the interval contains zero. `variance_kept` is what
    CUPED left of the variance, `power` the probability that this much data would show the
    minimum effect (for secondary metrics two points of a share, or 5% of the control's mean).
    """

    metric: str
    treatment: str
    control: str
    estimate: float
    se: float
    low: float
    high: float
    p: float
    control_mean: float
    relative: float
    better: bool | None
    variance_kept: float
    power: float


@dataclass(frozen=True, kw_only=True)
class GuardrailReport:
    """Whether an arm breached a guardrail: `harm_low` is the least harm the data allow."""

    metric: str
    treatment: str
    harm: float
    harm_low: float
    limit: float
    breached: bool


@dataclass(frozen=True, kw_only=True)
class Report:
    """All of it. `recommendation` is one sentence for a person; `notes` are caveats."""

    name: str
    unit: str
    primary_metric: str
    direction: str
    alpha: float
    num_units: int
    num_requests: int
    num_crossed: int
    arms: tuple[ArmReport, ...]
    primary: tuple[Comparison, ...]
    secondary: tuple[Comparison, ...]
    guardrails: tuple[GuardrailReport, ...]
    sample_ratio: SampleRatio
    verdict: Verdict
    winner: str | None
    recommendation: str
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON data; what is not known (NaN, infinite) as null."""
        data = asdict(self)
        data["sample_ratio"]["alarm"] = self.sample_ratio.alarm
        cleaned: dict[str, Any] = _finite(data)
        return cleaned


def _finite(data: Any) -> Any:  # noqa: ANN401 - walks any JSON data
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return data
