"""Shadows: after a client has its answer, another policy answers the same, or a judge grades it.

A mirrored request leaves a row of its own in the ledger (endpoint "shadow"), so its cost never
mixes with what clients cost, and no key or user pays for it. A judge's grade is feedback on that
row. The report says what shadows found: cost, agreement with the answers that were served, and
quality by labels; of a judge, its grades beside what people said of the same answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from models.engines.base import SamplingOptions
from models.errors import without_quotes
from policies.base import Decision
from policies.experiments.shadow import Shadow, ShadowMeter
from policies.footprint import estimate
from policies.grading.base import Question
from policies.grading.judge import read_grade, single_prompt
from policies.plan import Answer
from router.engines import merge
from router.exchange import Choice, Exchange, answer_digest
from router.executor.executor import Executor
from router.executor.judging import attempt
from router.executor.task import Prompt, Task
from router.ledger import LedgerError
from router.ledger.database import Database
from router.ledger.feedback import Feedback, add_feedback
from router.ledger.schema import FEEDBACK, REQUESTS
from router.ledger.writer import Ledger
from router.record import SHADOW, RequestRecord, mirrored_request_id

logger = logging.getLogger(__name__)

_DAY_S = 86_400
_RUBRIC_TOKENS = 100  # of what a judge is told beside question and answer, for the estimate


class Mirror:
    """Mirrors answered requests to policies and judges, each within its meter's share and cap."""

    def __init__(
        self,
        meters: Sequence[ShadowMeter],
        *,
        executor: Callable[[Exchange], Executor],
        ledger: Ledger,
    ) -> None:
        self._meters = tuple(meters)
        self._executor = executor
        self._ledger = ledger
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
            if meter.wants(exchange.id, model=exchange.ask.model):
                try:
                    self._begin(meter, exchange)
                except Exception:
                    # Whatever it is, the request that was answered is to be settled and recorded.
                    logger.exception("shadow %s: %s", meter.shadow.name, exchange.id)

    async def close(self) -> None:
        """Cut off what still runs; its cost so far is recorded."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    def _begin(self, meter: ShadowMeter, exchange: Exchange) -> None:
        """Mirror the request where the meter has room for it."""
        assert exchange.ask is not None
        mirrored = self._prepare(meter.shadow, exchange)
        estimate_usd = estimate(
            mirrored.choices[0].plan,
            exchange.catalog.prices.rates,
            prompt_tokens=mirrored.record.prompt_tokens,
            output_tokens=exchange.ask.max_tokens or exchange.limits.default_max_tokens,
        ).usd
        if meter.admit(estimate_usd=estimate_usd, now_s=time.time()):
            task = asyncio.ensure_future(self._run(meter, mirrored, exchange.id, estimate_usd))
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        else:
            _settle(mirrored)

    def _prepare(self, shadow: Shadow, exchange: Exchange) -> Exchange:
        """Return the exchange that answers the same question by the shadow's policy, or judges."""
        original = exchange.choices[0].task.judged()
        shadow_id = mirrored_request_id(shadow.name, exchange.id)
        task = replace(
            original, request_id=shadow_id, stream=False, client_id=f"shadow {shadow.name}"
        )
        num_tokens = exchange.record.prompt_tokens
        if shadow.policy is not None:
            decision = exchange.catalog.policies[shadow.policy].decide(original.query)
        else:
            assert shadow.judge is not None
            decision = Decision(plan=Answer(members=(shadow.judge,)))
            task = _judging(task, "".join(exchange.answer), shadow.rubric)
            num_tokens += exchange.record.output_tokens + _RUBRIC_TOKENS
        record = RequestRecord(
            request_id=shadow_id,
            endpoint=SHADOW,
            time_s=time.time(),
            policy=shadow.policy,
            edition=exchange.record.edition,
            prompt_tokens=num_tokens,
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
        text = grade = None
        try:
            async with asyncio.timeout(mirrored.limits.request_timeout_s):
                run = self._executor(mirrored).run(choice.plan, choice.task, choice.trace)
                answer = merge([chunk async for chunk in run])
            whole = attempt(choice.task.query, choice.plan, answer)
            score = mirrored.catalog.policies.scorers["confidence"].score(whole)
            choice.trace.runs[""].score = score  # the plan's root
            mirrored.record.output_tokens = len(answer.tokens)
            mirrored.record.status = 200
            if meter.shadow.judge is None:
                text = answer.text
            else:
                grade = read_grade(answer.text)
                mirrored.record.error = None if grade is not None else "no_grade"
        except Exception as error:
            logger.warning("shadow %s: %s", mirrored.record.policy, without_quotes(repr(error)))
            mirrored.record.status, mirrored.record.error = 500, type(error).__name__
        finally:
            mirrored.ended_s = time.perf_counter()
            record = mirrored.complete(mirrored.catalog.prices.rates)
            meter.settle(estimate_usd=estimate_usd, usd=record.usd)
            # Keyed by the original request, so that equal answers and labels compare.
            record.answer_digest = None if text is None else answer_digest(original_id, text)
            self._ledger.record(record)
            _settle(mirrored)
        if grade is not None:
            said = Feedback(request_id=record.request_id, time_s=time.time(), score=grade)
            await self._ledger.flush()  # feedback is on rows that are written
            try:
                await self._ledger.database.calls.run(add_feedback, self._ledger.database, said)
            except (SQLAlchemyError, LedgerError) as error:
                logger.warning("shadow %s: its grade is lost: %s", meter.shadow.name, error)


def _settle(mirrored: Exchange) -> None:
    """Tell the shadow's policy what its decision has cost."""
    policy = mirrored.catalog.policies.get(mirrored.record.policy or "")
    if policy is not None:
        for query, decision, cost in mirrored.settled(mirrored.catalog.prices.rates):
            policy.settle(query, decision, cost)


def _judging(task: Task, answer: str, rubric: str | None) -> Task:
    """Return the task of a judge who grades the `answer` to `task`."""
    messages = task.prompt.messages or ()
    asked = task.query.text
    if len(messages) > 1:
        asked = "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
    prompt = single_prompt(Question(query=asked), answer, rubric)
    return replace(
        task,
        query=replace(task.query, text=prompt, earlier=()),
        prompt=Prompt(messages=[{"role": "user", "content": prompt}]),
        sampling=SamplingOptions(temperature=0.0),
        max_tokens=None,
        sent=None,
    )


def shadow_report(
    database: Database, shadows: Sequence[Shadow], *, now_s: float
) -> list[dict[str, Any]]:
    """Return one object per shadow, over all its rows; blocks.

    `agreement` is the share of mirrored answers that equal the served ones, `quality` the mean
    score of those with a label (a judge's grade of those that were rated) beside `served_quality`,
    that of the served answers to the same.
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
    return {
        "object": "shadow",
        "name": shadow.name,
        "policy": shadow.policy,
        "judge": shadow.judge,
        "usd_per_day": shadow.usd_per_day,
        **(database.row(query) or {}),
        **({} if shadow.judge is None else {"agreement": None}),
    }


def _share(
    condition: sa.ColumnElement[bool], among: sa.ColumnElement[bool] | None
) -> sa.ColumnElement[Any]:
    flag = sa.case((condition, 1.0), else_=0.0)
    return sa.func.avg(flag if among is None else sa.case((among, flag)))
