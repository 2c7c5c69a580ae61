"""What experiments measure: the metrics that there are, one's own, and what is asked of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Literal, TypeAlias, get_args

from pydantic import Field, with_config

Direction: TypeAlias = Literal["increase", "decrease"]


@dataclass(frozen=True)
class Metric:
    """A mean over those requests that have a value. `direction` is the good one."""

    name: str
    direction: Direction
    unit: str

    @property
    def is_share(self) -> bool:
        """Whether it lies in [0, 1] by its nature."""
        return self.unit in ("share", "[0, 1]")


METRICS: Final[Mapping[str, Metric]] = {
    metric.name: metric
    for metric in (
        Metric("quality", "increase", "[0, 1]"),  # feedback, of the requests that have any
        Metric("judged_quality", "increase", "[0, 1]"),  # feedback, with the judge's help
        Metric("grade", "increase", "[0, 1]"),  # what the judge alone says
        Metric("predicted_quality", "increase", "[0, 1]"),  # the policy's own prediction
        Metric("feedback_rate", "increase", "share"),  # requests with feedback
        Metric("usd", "decrease", "USD"),
        Metric("wh", "decrease", "Wh"),
        Metric("gco2e", "decrease", "gCO2e"),
        Metric("latency_s", "decrease", "s"),  # time to the whole answer
        Metric("ttft_s", "decrease", "s"),  # time to the first text
        Metric("tokens", "decrease", "tokens"),  # read and written by all members
        Metric("error_rate", "decrease", "share"),  # requests that failed at the server
        Metric("escalation_rate", "decrease", "share"),  # requests that needed a later stage
    )
}

# As feedback may name a number.
METRIC_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")

# Metrics that there are with a judge only.
JUDGED = ("judged_quality", "grade")
Covariate: TypeAlias = Literal["prompt_tokens", "expected_quality"]
COVARIATES: tuple[Covariate, ...] = get_args(Covariate)


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class OwnMetric:
    """A metric of one's own: a number that feedback brings under its name, or a ratio of two.

    A "binary" one is 0 or 1, and other values of it are left out. `ratio` names numerator and
    denominator, metrics of any kind whose sums are divided over the requests that have both.
    `minimum_effect` is as in `Goal`; it tunes the interval.
    """

    direction: Direction
    kind: Literal["binary", "real"] = "real"
    unit: str = ""
    ratio: tuple[str, str] | None = None
    minimum_effect: float = 0.05
    relative: bool = True


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class Goal:
    """The metric that decides, and the smallest change in it that would matter.

    `minimum_effect` is in the metric's own unit, or a share of the control's mean if `relative`.
    The confidence sequence is tightest once the data could show an effect of this size.
    """

    metric: str = "quality"
    direction: Direction | None = None
    minimum_effect: float = 0.02
    relative: bool = False

    def smallest(self, control_mean: float) -> float:
        """Return the minimum effect in the metric's own unit."""
        return self.minimum_effect * (abs(control_mean) if self.relative else 1.0)


@with_config(extra="forbid")
@dataclass(frozen=True, kw_only=True)
class Guardrail:
    """Stop an arm when its `metric` is surely worse than the control's by more than `limit`.

    `limit` is in the metric's own unit, or a share of the control's mean if `relative`.
    """

    metric: str
    limit: Annotated[float, Field(ge=0)] = 0.0
    relative: bool = False
