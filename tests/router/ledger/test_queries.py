"""Sums, feedback, outcomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from router.ledger import LedgerError
from router.ledger.database import Database
from router.ledger.feedback import Feedback, add_feedback, rated_requests
from router.ledger.queries import Period, requests, spend
from router.ledger.schema import REQUESTS
from router.ledger.writer import Ledger
from router.record import MemberTokens
from tests.router.ledger.records import record

NewLedger = Callable[..., Ledger]
DAY_S = 86400
MIDNIGHT_S = 20_000 * DAY_S


def _fill(ledger: Ledger) -> None:
    ledger.record(record(1, time_s=MIDNIGHT_S - 0.001, key_id="a", usd=1.0))
    ledger.record(record(2, time_s=MIDNIGHT_S, key_id="a", usd=2.0, policy=None, arm="x"))
    ledger.record(record(3, time_s=MIDNIGHT_S + 3600, key_id="b", usd=4.0, experiment="e"))
    ledger.record(record(4, time_s=MIDNIGHT_S + 7200, key_id=None, usd=0.0, status=503))
    ledger.record(record(5, time_s=MIDNIGHT_S + 7200, key_id="b", usd=0.5, status=499))
    ledger.stop()


def test_sums_by_any_combination(database: Database, new_ledger: NewLedger) -> None:
    """Groups add up to the total, days are cut at UTC midnight, largest spend comes first."""
    _fill(new_ledger())
    [total] = spend(database)
    assert [row.group for row in spend(database, by=["method"])] == [("modelled:llmcarbon",)]
    assert (total.num_requests, total.num_answered, total.num_failed) == (5, 3, 1)
    assert (total.usd, total.prompt_tokens, total.output_tokens) == (7.5, 50, 100)
    by_key = spend(database, by=["key"])
    assert [(row.group, row.usd) for row in by_key] == [(("b",), 4.5), (("a",), 3.0), ((None,), 0)]
    by_day = {row.group: row.num_requests for row in spend(database, by=["day", "key"])}
    assert by_day == {
        (MIDNIGHT_S - DAY_S, "a"): 1,
        (MIDNIGHT_S, "a"): 1,
        (MIDNIGHT_S, "b"): 2,
        (MIDNIGHT_S, None): 1,
    }
    assert {row.group[0] for row in spend(database, by=["hour"])} == {
        MIDNIGHT_S + offset for offset in (-3600, 0, 3600, 7200)
    }
    for name in ("model", "policy", "members", "experiment", "arm", "endpoint", "status", "method"):
        assert sum(row.usd for row in spend(database, by=[name])) == 7.5


def test_periods_are_half_open(database: Database, new_ledger: NewLedger) -> None:
    """A row at the end of a period belongs to the next; nothing there sums to no groups."""
    _fill(new_ledger())
    [first] = spend(database, where=Period(until_s=MIDNIGHT_S).holds())
    [second] = spend(
        database, where=[*Period(since_s=MIDNIGHT_S).holds(), REQUESTS.c.key_id == "a"]
    )
    assert (first.usd, second.usd) == (1.0, 2.0)
    assert spend(database, where=Period(since_s=MIDNIGHT_S + DAY_S).holds()) == []
    last = [
        row["request_id"] for row in requests(database, period=Period(since_s=MIDNIGHT_S + 7200))
    ]
    assert last == ["req-4", "req-5"]


def test_feedback_is_idempotent_and_the_latest_counts(
    database: Database, new_ledger: NewLedger
) -> None:
    """Feedback sent twice counts once; a change of mind replaces it, an older one does not."""
    _fill(new_ledger())
    for time_s, score in ((10, 1.0), (10, 1.0), (20, 0.25), (15, 0.75)):
        add_feedback(database, Feedback(request_id="req-2", time_s=time_s, score=score))
    add_feedback(database, Feedback(request_id="req-3", time_s=10, label="42"))
    found = {
        o.row["request_id"]: (o.score, o.label, o.feedback_s) for o in rated_requests(database)
    }
    assert found == {
        "req-1": (None, None, None),
        "req-2": (0.25, None, 20.0),
        "req-3": (None, "42", 10.0),
        "req-4": (None, None, None),
        "req-5": (None, None, None),
    }
    joined = [o.row["request_id"] for o in rated_requests(database, only_with_feedback=True)]
    assert joined == ["req-2", "req-3"]
    assert [o.label for o in rated_requests(database, experiment="e")] == ["42"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"request_id": "req-99", "score": 1.0}, "no request 'req-99'"),
        ({"request_id": "req-4", "score": 1.0}, "got no answer"),
        ({"request_id": "req-1", "score": 1.5}, "not in"),
        ({"request_id": "req-1", "score": float("nan")}, "not in"),
        ({"request_id": "req-1"}, "give a score"),
    ],
)
def test_bad_feedback_is_refused(
    database: Database, new_ledger: NewLedger, said: dict[str, Any], message: str
) -> None:
    """Feedback on nothing, or of nothing, is refused with the reason and leaves no row."""
    _fill(new_ledger())
    with pytest.raises(LedgerError, match=message):
        add_feedback(database, Feedback(time_s=1, **said))
    assert list(rated_requests(database, only_with_feedback=True)) == []


def test_outcomes_train_routers_only_where_they_can(
    database: Database, new_ledger: NewLedger
) -> None:
    """A line for training needs text, a score, and one member to whom the score belongs."""
    ledger = new_ledger()
    alone = {"math": MemberTokens(prompt_tokens=3, output_tokens=4)}
    ledger.record(record(1, members=alone, query_text="2+2?"))
    ledger.record(record(2, members=alone))
    ledger.record(record(3, query_text="fused"))
    ledger.record(record(4, members=alone, query_text="unscored"))
    ledger.stop()
    for number in (1, 2, 3):
        add_feedback(database, Feedback(request_id=f"req-{number}", time_s=1, score=1.0))
    lines = [line for o in rated_requests(database) if (line := o.to_line())]
    assert lines == [
        {
            "query": "2+2?",
            "scores": {"math": 1.0},
            "costs": {"math": 0.001},
            "output_tokens": {"math": 4},
        }
    ]
