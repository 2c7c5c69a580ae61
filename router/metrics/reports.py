"""Figures that take a look at many rows: worked out by one replica, now and then, for all."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from sqlalchemy.exc import SQLAlchemyError

from policies.budget import Controller
from policies.experiments.report import Report
from policies.experiments.shadow import Shadow
from router.budget_sync import read_spending
from router.experiments.experiments import Experiments
from router.experiments.shadow_report import shadow_report
from router.ledger.database import Database
from router.metrics import families as f
from router.metrics.calibration import calibration_gauges
from router.metrics.family import Series
from router.metrics.store import Store
from router.threads import in_thread

logger = logging.getLogger(__name__)

HOLDER = "reports"

# They are renewed this often, but take no more than this share of one core's time.
_EVERY_S = 10.0
_SHARE = 0.05


class Reports:
    """Renews the figures when somebody asks for them and they are old; every replica has one."""

    def __init__(
        self,
        *,
        database: Database,
        store: Store,
        experiments: Experiments,
        shadows: Sequence[Shadow],
        controllers: Mapping[str, Controller],
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Report on `experiments`, `shadows`, and the targets of policies' `controllers`."""
        self._database = database
        self._store = store
        self._experiments = experiments
        self._shadows = tuple(shadows)
        self._controllers = dict(controllers)
        self._clock = clock
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
            if not await in_thread(
                self._store.claim, HOLDER, now_s=self._clock(), every_s=self._every_s
            ):
                return
            began_s = time.monotonic()
            summaries = await self._experiments.summaries()
            gauges = experiment_gauges(summary.report for summary in summaries)
            gauges |= await in_thread(self._read)
            await in_thread(self._store.publish, HOLDER, gauges, now_s=self._clock())
            self._every_s = max(_EVERY_S, (time.monotonic() - began_s) / _SHARE)
        except SQLAlchemyError as error:
            logger.warning("metrics: the reports wait for the ledger: %s", error)

    def _read(self) -> dict[Series, float]:
        now_s = self._clock()
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
