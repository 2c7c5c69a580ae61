"""What users thought of answers: kept, and joined with the requests.

A score in [0, 1], a thumb, the right answer as a label, or numbers of one's own. The join is what
experiments compare and routers learn from.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import sqlalchemy as sa

from router.ledger import LedgerError
from router.ledger.database import Database, writing
from router.ledger.queries import ALWAYS, Period, stream
from router.ledger.schema import FEEDBACK, REQUESTS
from router.ledger.writer import insert_new
from router.record import SHADOW, mirrored_request_id

_JUDGED = FEEDBACK.alias("judged")


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """What one user said about the answer to `request_id`, at Unix time `time_s`.

    `score` is in [0, 1] (thumbs are 1 and 0); `label` is the right answer, where the user gave
    it; `metrics` are numbers by names of one's own. At least one of them is there.
    """

    request_id: str
    time_s: float
    score: float | None = None
    label: str | None = None
    metrics: Mapping[str, float] | None = None
    key_id: str | None = None

    def __post_init__(self) -> None:
        if self.score is None and self.label is None and not self.metrics:
            raise LedgerError("feedback: give a score, a thumb, a label or metrics")
        if self.score is not None and not 0 <= self.score <= 1:
            raise LedgerError(f"feedback.score: {self.score} is not in [0, 1]")


def add_feedback(database: Database, feedback: Feedback) -> None:
    """Keep `feedback`; sent again it changes nothing, and what is later replaces what was earlier.

    Raises `LedgerError` where no answered request has that id. (A request is known once its row
    is written: call `Ledger.flush` before refusing a client's feedback.)
    """
    with writing(database) as connection:
        known = connection.execute(
            sa.select(REQUESTS.c.status).where(REQUESTS.c.request_id == feedback.request_id)
        ).scalar_one_or_none()
        if known is None:
            raise LedgerError(f"feedback: there is no request {feedback.request_id!r}")
        if known >= 400:
            raise LedgerError(
                f"feedback: the request {feedback.request_id!r} got no answer (status {known})"
            )
        row = asdict(feedback)
        connection.execute(insert_new(connection, FEEDBACK), row)
        connection.execute(
            sa.update(FEEDBACK)
            .where(
                FEEDBACK.c.request_id == feedback.request_id, FEEDBACK.c.time_s < feedback.time_s
            )
            .values({name: value for name, value in row.items() if value is not None})
        )


@dataclass(frozen=True, kw_only=True)
class RatedRequest:
    """One request and what its user thought of the answer, if anything (yet).

    `row` is the row of the table `requests`. `score` is the user's, in [0, 1]; `label` the right
    answer, where given: whoever reads the answer may score it by that. `metrics` are numbers by
    names of one's own. `feedback_s` is when the feedback came. `grade` is a judge's, in [0, 1].
    """

    row: dict[str, Any]
    score: float | None
    label: str | None
    feedback_s: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    grade: float | None = None

    def to_line(self) -> dict[str, Any] | None:
        """Return a line of the outcomes format that routers are trained on, or None.

        None where no text was kept, no score was given, or several members had a hand in the
        answer: the score is then no single member's.
        """
        text, score = self.row["query_text"], self.score
        members = self.row["members"] or {}
        if text is None or score is None or len(members) != 1:
            return None
        [(name, tokens)] = members.items()
        return {
            "query": text,
            "scores": {name: score},
            "costs": {name: self.row["usd"]},
            "output_tokens": {name: tokens["output_tokens"]},
        }


def rated_requests(
    database: Database,
    *,
    period: Period = ALWAYS,
    experiment: str | None = None,
    only_with_feedback: bool = False,
    judge: str | None = None,
) -> Generator[RatedRequest]:
    """Yield the requests of `period` with their feedback, in order of time.

    The grades are those of the shadow called `judge`.

    Requests that failed are among them (`row["status"]`): leaving them out would flatter an arm
    that fails on hard queries.
    """
    query = (
        sa.select(
            REQUESTS,
            FEEDBACK.c.score.label("feedback_score"),
            FEEDBACK.c.label.label("feedback_label"),
            FEEDBACK.c.time_s.label("feedback_s"),
            FEEDBACK.c.metrics.label("feedback_metrics"),
            sa.null().label("grade") if judge is None else _JUDGED.c.score.label("grade"),
        )
        .join_from(
            REQUESTS,
            FEEDBACK,
            REQUESTS.c.request_id == FEEDBACK.c.request_id,
            isouter=not only_with_feedback,
        )
        .where(*period.holds())
        .order_by(REQUESTS.c.time_s)
    )
    if experiment is not None:
        query = query.where(REQUESTS.c.experiment == experiment)
    if judge is not None:
        graded_id = sa.literal(mirrored_request_id(judge, "")).concat(REQUESTS.c.request_id)
        query = query.outerjoin(_JUDGED, _JUDGED.c.request_id == graded_id)
    with closing(stream(database, query)) as rows:
        for row in rows:
            score, label = row.pop("feedback_score"), row.pop("feedback_label")
            metrics, grade = row.pop("feedback_metrics") or {}, row.pop("grade")
            yield RatedRequest(
                row=row,
                score=score,
                label=label,
                feedback_s=row.pop("feedback_s"),
                metrics=metrics,
                grade=grade,
            )


def asked(database: Database) -> dict[str, str | None]:
    """Return what clients asked and were answered, where texts were kept, and the right answer
    where a user gave it; shadows' requests are not among them."""
    query = (
        sa.select(REQUESTS.c.query_text, FEEDBACK.c.label)
        .join_from(REQUESTS, FEEDBACK, REQUESTS.c.request_id == FEEDBACK.c.request_id, isouter=True)
        .where(REQUESTS.c.query_text != "", REQUESTS.c.status < 400, REQUESTS.c.endpoint != SHADOW)
        .order_by(REQUESTS.c.time_s)
    )
    found: dict[str, str | None] = {}
    with closing(stream(database, query)) as rows:
        for row in rows:
            found[row["query_text"]] = row["label"] or found.get(row["query_text"])
    return found
