"""Shadows: after a client has its answer, another policy answers the same, for nobody.

A mirrored request leaves a row of its own in the ledger (endpoint "shadow"), so its cost never
mixes with what clients cost, and no key or user pays for it. The report says what shadows found:
cost, agreement with the answers that were served, and quality by labels.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa

from policies.experiments.shadow import Shadow, ShadowMeter
from policies.footprint import estimate
from router.engines import merge
from router.exchange import Choice, Exchange, answer_digest
from router.executor.executor import Executor
from router.executor.judging import attempt
from router.ledger.database import Database
from router.ledger.schema import FEEDBACK, REQUESTS
from router.ledger.writer import Ledger
from router.record import SHADOW, RequestRecord

logger = logging.getLogger(__name__)

_DAY_S = 86_400


def mirrored_request_id(shadow: str, request_id: str) -> str:
    """Return the id of the row that `shadow` leaves for `request_id`."""
    return f"{shadow}/{request_id}"


class Mirror:
    """Mirrors answered requests to other policies, each within its meter's share and cap."""

    def __init__(
        self,
        meters: Sequence[ShadowMeter],
        *,
        executor: Callable[[Exchange], Executor],
        ledger: Ledger,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._meters = tuple(meters)
        self._executor = executor
        self._ledger = ledger
        self._clock = clock
        self._running: set[asyncio.Task[None]] = set()

    @property
    def shadows(self) -> tuple[Shadow, ...]:
        """The configured shadows."""
        return tuple(meter.shadow for meter in self._meters)

    def after(self, exchange: Exchange) -> None:
        """Mirror the request that `exchange` has answered, where its turn has come.

        Returns at once; nothing that happens later reaches the client. Requests for several
        answers, or for none, are not mirrored.
        """
        if exchange.record.status != 200 or len(exchange.choices) != 1 or exchange.ask is None:
            return
        if exchange.choices[0].task.prompt.encoding is not None:
            return
        for meter in self._meters:
            if not meter.wants(exchange.id, model=exchange.ask.model):
                continue
            mirrored = self._prepare(meter.shadow, exchange)
            estimate_usd = estimate(
                mirrored.choices[0].plan,
                exchange.catalog.prices.rates,
                prompt_tokens=exchange.record.prompt_tokens,
                output_tokens=exchange.ask.max_tokens or exchange.limits.default_max_tokens,
            ).usd
            if meter.admit(estimate_usd=estimate_usd, now_s=self._clock()):
                task = asyncio.ensure_future(self._run(meter, mirrored, exchange.id, estimate_usd))
                self._running.add(task)
                task.add_done_callback(self._running.discard)

    async def close(self) -> None:
        """Cut off what still runs; its cost so far is recorded."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _prepare(self, shadow: Shadow, exchange: Exchange) -> Exchange:
        """Return the exchange that answers the same question by the shadow's policy."""
        original = exchange.choices[0].task
        decision = exchange.catalog.policies[shadow.policy].decide(original.query)
        shadow_id = mirrored_request_id(shadow.name, exchange.id)
        task = replace(
            original, request_id=shadow_id, stream=False, client_id=f"shadow {shadow.name}"
        )
        record = RequestRecord(
            request_id=shadow_id,
            endpoint=SHADOW,
            time_s=self._clock(),
            policy=shadow.policy,
            edition=exchange.record.edition,
            prompt_tokens=exchange.record.prompt_tokens,
        )
        return Exchange(
            record=record,
            ask=exchange.ask,
            decisions=(decision,),
            choices=(Choice(plan=decision.plan, task=task),),
            terms=exchange.terms,
        )

    async def _run(
        self, meter: ShadowMeter, mirrored: Exchange, original_id: str, estimate_usd: float
    ) -> None:
        [choice] = mirrored.choices
        mirrored.started_s = time.perf_counter()
        text = None
        try:
            async with asyncio.timeout(mirrored.limits.request_timeout_s):
                run = self._executor(mirrored).run(choice.plan, choice.task, choice.trace)
                answer = merge([chunk async for chunk in run])
            whole = attempt(choice.task.query, choice.plan, answer)
            score = mirrored.catalog.policies.scorers["confidence"].score(whole)
            choice.trace.runs[""].score = score  # the plan's root
            mirrored.record.output_tokens = len(answer.tokens)
            mirrored.record.status, text = 200, answer.text
        except Exception as error:
            logger.warning("shadow %s: %r", mirrored.record.policy, error)
            mirrored.record.status, mirrored.record.error = 500, type(error).__name__
        finally:
            mirrored.ended_s = time.perf_counter()
            record = mirrored.complete(mirrored.catalog.prices.rates)
            meter.settle(estimate_usd=estimate_usd, usd=record.usd)
            # Keyed by the original request, so that equal answers and labels compare.
            record.answer_digest = None if text is None else answer_digest(original_id, text)
            self._ledger.record(record)


def shadow_report(
    database: Database, shadows: Sequence[Shadow], *, now_s: float
) -> list[dict[str, Any]]:
    """Return one object per shadow, over all its rows; blocks.

    `agreement` is the share of mirrored answers that equal the served ones, `quality` the mean
    score of those with a label beside `served_quality`, that of the served answers to the same.
    """
    return [_report(database, shadow, now_s) for shadow in shadows]


def _report(database: Database, shadow: Shadow, now_s: float) -> dict[str, Any]:
    prefix = mirrored_request_id(shadow.name, "")
    served = REQUESTS.alias("served")
    served_feedback = FEEDBACK.alias("served_feedback")
    row, answered = REQUESTS.c, REQUESTS.c.status < 400
    today_s = now_s - now_s % _DAY_S
    both = sa.and_(FEEDBACK.c.score.is_not(None), served_feedback.c.score.is_not(None))
    query = (
        sa.select(
            sa.func.count().label("num_mirrored"),
            _share(answered, None).label("answered"),
            sa.func.coalesce(sa.func.sum(row.usd), 0.0).label("usd"),
            sa.func.coalesce(sa.func.sum(sa.case((row.time_s >= today_s, row.usd))), 0.0).label(
                "usd_today"
            ),
            sa.func.avg(sa.case((answered, row.latency_s))).label("latency_s"),
            _share(row.answer_digest == served.c.answer_digest, answered).label("agreement"),
            sa.func.avg(sa.case((both, FEEDBACK.c.score))).label("quality"),
            sa.func.avg(sa.case((both, served_feedback.c.score))).label("served_quality"),
            sa.func.sum(sa.case((both, 1), else_=0)).label("num_labelled"),
        )
        .select_from(REQUESTS)
        .join(served, served.c.request_id == sa.func.substr(row.request_id, len(prefix) + 1))
        .outerjoin(FEEDBACK, FEEDBACK.c.request_id == row.request_id)
        .outerjoin(served_feedback, served_feedback.c.request_id == served.c.request_id)
        .where(row.endpoint == SHADOW, row.request_id.startswith(prefix, autoescape=True))
    )
    with database.connect() as connection:
        found = connection.execute(query).mappings().one()
    return {
        "object": "shadow",
        "name": shadow.name,
        "policy": shadow.policy,
        "usd_per_day": shadow.usd_per_day,
        **found,
    }


def _share(
    condition: sa.ColumnElement[bool], among: sa.ColumnElement[bool] | None
) -> sa.ColumnElement[Any]:
    flag = sa.case((condition, 1.0), else_=0.0)
    return sa.func.avg(flag if among is None else sa.case((among, flag)))
