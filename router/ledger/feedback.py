"""What users thought of answers: a score in [0, 1], a thumb, or the right answer as a label."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import sqlalchemy as sa

from router.ledger.database import Database, writing
from router.ledger.errors import LedgerError
from router.ledger.schema import FEEDBACK, REQUESTS
from router.ledger.writer import insert_new


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """What one user said about the answer to `request_id`, at Unix time `time_s`.

    `score` is in [0, 1] (thumbs are 1 and 0); `label` is the right answer, where the user gave
    it. At least one of them is there.
    """

    request_id: str
    time_s: float
    score: float | None = None
    label: str | None = None
    key_id: str | None = None

    def __post_init__(self) -> None:
        if self.score is None and self.label is None:
            raise LedgerError("feedback: give a score, a thumb or a label")
        if self.score is not None and not 0 <= self.score <= 1:
            raise LedgerError(f"feedback.score: {self.score} is not in [0, 1]")


def add_feedback(database: Database, feedback: Feedback) -> None:
    """Keep `feedback`; sent again it changes nothing, and later feedback replaces earlier.

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
            .values(**row)
        )
