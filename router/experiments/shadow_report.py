"""What shadows found: cost, agreement with the answers that were served, and quality by labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from policies.experiments.shadow import Shadow
from router.experiments.mirror import mirrored_request_id
from router.ledger.database import Database
from router.ledger.schema import FEEDBACK, REQUESTS
from router.record import SHADOW

_DAY_S = 86_400


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
