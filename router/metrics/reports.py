"""Figures that take a look at many rows: worked out by one replica, now and then, for all.

Experiments, shadows, budget targets, and whether the router's predictions still hold: predicted
quality against users' scores.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from policies.budget.controller import Controller
from policies.experiments.report import Report
from policies.experiments.shadow import Shadow
from router.background import read_spending
from router.experiments.experiments import Experiments
from router.experiments.reporting import predicted_quality
from router.experiments.shadows import shadow_report
from router.ledger.database import Database
from router.ledger.queries import ANSWERED, SERVED
from router.ledger.schema import FEEDBACK, REQUESTS
from router.metrics import families as f
from router.metrics.counting import Store
from router.metrics.families import Series

logger = logging.getLogger(__name__)

HOLDER = "reports"

# They are renewed this often, but take no more than this share of one core's time.
_EVERY_S = 10.0
_SHARE = 0.05

# As many rated answers are looked at, the latest ones.
_LAST = 2000
_NUM_BINS = 10

_RATED = (
    sa.select(REQUESTS.c.policy, REQUESTS.c.scores, REQUESTS.c.members, FEEDBACK.c.score)
    .join_from(FEEDBACK, REQUESTS, REQUESTS.c.request_id == FEEDBACK.c.request_id)
    .where(FEEDBACK.c.score.is_not(None), ANSWERED, SERVED)
    .order_by(FEEDBACK.c.time_s.desc())
    .limit(_LAST)
)


class Reports:
    """Renews the figures when somebody asks for them and they are old; every replica has one."""

    def __init__(
        self,
        store: Store,
        *,
        experiments: Experiments,
        shadows: Sequence[Shadow],
        controllers: Mapping[str, Controller],
    ) -> None:
        """Report on `experiments`, `shadows`, and the targets of policies' `controllers`."""
        self._database = store.database
        self._store = store
        self._experiments = experiments
        self._shadows = tuple(shadows)
        self._controllers = controllers
        self._every_s = _EVERY_S
        self._renewing: asyncio.Task[None] | None = None

    async def renew(self, *, wait_s: float) -> None:
        """Renew the figures if no replica has lately; wait for it, but at most `wait_s`."""
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._renew())
        await asyncio.wait([self._renewing], timeout=wait_s)

    async def close(self) -> None:
        """Stop renewing; idempotent."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)

    async def _renew(self) -> None:
        try:
            if not await self._database.reports.run(
                self._store.claim, HOLDER, now_s=time.time(), every_s=self._every_s
            ):
                return
            began_s = time.monotonic()
            summaries = await self._experiments.summaries()
            gauges = experiment_gauges(summary.report for summary in summaries)
            gauges |= await self._database.reports.run(self._read)
            await self._database.reports.run(self._store.publish, HOLDER, gauges, now_s=time.time())
            self._every_s = max(_EVERY_S, (time.monotonic() - began_s) / _SHARE)
        except SQLAlchemyError as error:
            logger.warning("metrics: the reports wait for the ledger: %s", error)

    def _read(self) -> dict[Series, float]:
        now_s = time.time()
        return {
            **calibration_gauges(self._database),
            **_shadow_gauges(self._database, self._shadows, now_s),
            **_target_gauges(self._database, self._controllers, now_s),
        }


def experiment_gauges(reports: Iterable[Report]) -> dict[Series, float]:
    """Return units, effects with intervals, p-values and alarms."""
    found: dict[Series, float] = {}
    for report in reports:
        found[f.EXPERIMENT_SAMPLE_RATIO.series(report.name)] = report.sample_ratio.p
        for arm in report.arms:
            found[f.EXPERIMENT_UNITS.series(report.name, arm.name)] = float(arm.num_units)
        for effect in (*report.primary, *report.secondary):
            labels = (report.name, effect.treatment, effect.metric)
            found |= {
                f.EXPERIMENT_EFFECT.series(*labels): effect.estimate,
                f.EXPERIMENT_EFFECT_LOW.series(*labels): effect.low,
                f.EXPERIMENT_EFFECT_HIGH.series(*labels): effect.high,
                f.EXPERIMENT_P.series(*labels): effect.p,
            }
        for guard in report.guardrails:
            labels = (report.name, guard.treatment, guard.metric)
            found[f.EXPERIMENT_GUARDRAIL.series(*labels)] = float(guard.breached)
    return found


def _shadow_gauges(
    database: Database, shadows: Sequence[Shadow], now_s: float
) -> dict[Series, float]:
    found: dict[Series, float] = {}
    for report in shadow_report(database, shadows, now_s=now_s):
        for family, key in (
            (f.SHADOW_REQUESTS, "num_mirrored"),
            (f.SHADOW_AGREEMENT, "agreement"),
            (f.SHADOW_QUALITY, "quality"),
            (f.SHADOW_SERVED_QUALITY, "served_quality"),
        ):
            if report[key] is not None:
                found[family.series(report["name"])] = float(report[key])
    return found


def _target_gauges(
    database: Database, controllers: Mapping[str, Controller], now_s: float
) -> dict[Series, float]:
    found: dict[Series, float] = {}
    for policy, controller in controllers.items():
        spending = read_spending(
            database, policy=policy, since_s=controller.window_started_s(now_s)
        )
        if spending is None:
            continue
        for target in controller.targets:
            due = target.budget(
                elapsed_s=now_s - spending.first_s, num_requests=spending.num_requests
            )
            if due > 0:
                share = getattr(spending, target.resource) / due
                found[f.TARGET_USED_RATIO.series(policy, target.resource)] = share
    return found


@dataclass(kw_only=True)
class _Rated:
    """One policy's rated answers: their scores, and (prediction, score) where one was made."""

    scores: list[float] = field(default_factory=list)
    pairs: list[tuple[float, float]] = field(default_factory=list)


def calibration_gauges(database: Database) -> dict[Series, float]:
    """Return users' mean score and the predictions' error per policy; blocks."""
    policies: dict[str, _Rated] = defaultdict(_Rated)
    with database.connect() as connection:
        for policy, scores, members, score in connection.execute(_RATED):
            rated = policies[policy or f.NONE]
            rated.scores.append(score)
            predicted = predicted_quality(scores or {}, members or {})
            if predicted is not None:
                rated.pairs.append((predicted, score))
    found: dict[Series, float] = {}
    for policy, rated in policies.items():
        found[f.FEEDBACK_SCORE.series(policy)] = sum(rated.scores) / len(rated.scores)
        found[f.FEEDBACK_ANSWERS.series(policy)] = float(len(rated.scores))
        if rated.pairs:
            found[f.CALIBRATION_ANSWERS.series(policy)] = float(len(rated.pairs))
            found[f.CALIBRATION_BIAS.series(policy)] = _gap(rated.pairs)
            found[f.CALIBRATION_ERROR.series(policy)] = expected_error(rated.pairs)
    return found


def expected_error(pairs: list[tuple[float, float]]) -> float:
    """Return the expected calibration error of (prediction, outcome) pairs, in [0, 1].

    Predictions are put into ten bins of equal width; the error is the mean of the bins' gaps
    between mean prediction and mean outcome, weighted by their sizes (Naeini et al. 2015; Guo et
    al. 2017, equation 3).
    """
    bins: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for pair in pairs:
        bins[min(int(pair[0] * _NUM_BINS), _NUM_BINS - 1)].append(pair)
    return sum(abs(_gap(found)) * len(found) for found in bins.values()) / len(pairs)


def _gap(pairs: list[tuple[float, float]]) -> float:
    return sum(predicted - score for predicted, score in pairs) / len(pairs)
