"""Gauges: of caps, of calibration, and of several replicas together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from models.engines.base import EngineStats
from models.errors import EngineFailed
from policies.footprint import Cost
from router.access.limits import SERVER, Amounts, BudgetsConfig, limits
from router.access.store import BudgetStore, Reserve, Settle
from router.ledger.database import Database
from router.ledger.feedback import Feedback, add_feedback
from router.ledger.writer import Ledger
from router.metrics import families as f
from router.metrics.gauges import budget_gauges, engine_gauges, merge
from router.metrics.reports import calibration_gauges, expected_error
from tests.router.ledger.records import record

NOON_S = 1_800_014_400 - 1_800_014_400 % 86_400 + 43_200.0


def test_caps_show_use_rest_and_time(database: Database) -> None:
    """Spent and held count as used; half a day is over at noon; a key shows by its name."""
    config = BudgetsConfig(server={"usd_per_day": 10, "requests_per_hour": 0}, per_key={})
    store = BudgetStore(database, holder="here", lease_s=60)
    cap = limits(SERVER, BudgetsConfig(server={"usd_per_day": 10}).server_caps(), NOON_S)
    store.apply([], [_reserve("a", 1.0, cap), _reserve("b", 3.0, cap)], NOON_S)
    spent = Amounts.of(tokens=1, cost=Cost(usd=0.5))
    store.apply([Settle(request_id="a", used=spent)], [], NOON_S)
    found = budget_gauges(database, config, now_s=NOON_S)
    assert found[f.BUDGET_USED["usd"].series("server", "day")] == pytest.approx(3.5)
    assert found[f.BUDGET_REMAINING["usd"].series("server", "day")] == pytest.approx(6.5)
    assert found[f.BUDGET_USED_RATIO.series("server", "day", "usd")] == pytest.approx(0.35)
    assert found[f.BUDGET_USED_RATIO.series("server", "hour", "requests")] == 1, "nothing is all"
    assert found[f.BUDGET_ELAPSED_RATIO.series("day")] == pytest.approx(0.5)
    tomorrow = budget_gauges(database, config, now_s=NOON_S + 86_400)
    assert tomorrow[f.BUDGET_USED["usd"].series("server", "day")] == 0


def _reserve(request_id: str, usd: float, cap: object) -> Reserve:
    amounts = Amounts.of(tokens=1, cost=Cost(usd=usd))
    return Reserve(request_id=request_id, amounts=amounts, limits=cap)  # type: ignore[arg-type]


def test_no_caps_no_gauges(database: Database) -> None:
    """Without caps nothing is said of budgets."""
    assert budget_gauges(database, BudgetsConfig(), now_s=NOON_S) == {}


def test_calibration_error_by_hand() -> None:
    """Two bins: (0.85 against 0.5, two answers) and (0.25 against 1, one): ECE = 0.95 / 2.

    (2 * |0.85 - 0.5| + 1 * |0.25 - 1|) / 3.
    """
    pairs = [(0.8, 1.0), (0.9, 0.0), (0.25, 1.0)]
    assert expected_error(pairs) == pytest.approx((abs(0.8 - 1) + abs(0.9 - 0) + 0.75) / 3)
    assert expected_error([(0.81, 1.0), (0.89, 0.0)]) == pytest.approx(0.35)
    assert expected_error([(1.0, 1.0)]) == 0


def test_predictions_meet_users_scores(
    database: Database, new_ledger: Callable[..., Ledger]
) -> None:
    """Predicted 0.9, rated 0.5 on average: a bias of 0.4, by policy; shadows don't count."""
    ledger = new_ledger()
    fields: dict[int, dict[str, object]] = {3: {"policy": "fixed", "scores": {}}}
    fields[4] = {"endpoint": "shadow"}
    for number in range(5):
        ledger.record(record(number, **fields.get(number, {})))
    asyncio.run(ledger.flush())
    for number, score in enumerate((1.0, 0.5, 0.0, 1.0, 1.0)):
        add_feedback(
            database, Feedback(request_id=f"req-{number}", time_s=float(number), score=score)
        )
    found = calibration_gauges(database)
    assert found[f.FEEDBACK_SCORE.series("learned")] == pytest.approx(0.5)
    assert found[f.FEEDBACK_ANSWERS.series("learned")] == 3
    assert found[f.CALIBRATION_BIAS.series("learned")] == pytest.approx(0.4)
    assert found[f.CALIBRATION_ERROR.series("learned")] == pytest.approx(0.4)
    assert found[f.FEEDBACK_SCORE.series("fixed")] == 1
    assert f.CALIBRATION_ANSWERS.series("fixed") not in found


def test_replicas_become_one() -> None:
    """Prices are averaged, waiting rows added, and one stale replica makes the grid stale."""
    price, rows, stale = f.PRICES["usd"].series("auto"), f.PENDING_ROWS.series(), f.GRID_STALE
    found = merge(
        [
            {price: 1.0, rows: 5.0, stale.series(): 0.0},
            {price: 3.0, rows: 2.0, stale.series(): 1.0, ("shoal_of_tomorrow",): 1.0},
        ]
    )
    assert found == {price: 2.0, rows: 7.0, stale.series(): 1.0, f.REPLICAS.series(): 2.0}


class _Engine:
    """Says what it is told to; None: it is down."""

    def __init__(self, stats: EngineStats | None) -> None:
        self._stats = stats

    async def stats(self) -> EngineStats:
        if self._stats is None:
            raise EngineFailed("down")
        return self._stats


def test_engines_tell_how_they_are() -> None:
    """One that runs shows how often it was started again, one that is down only that."""
    engines = {"well": _Engine(EngineStats(restarts_total=2)), "down": _Engine(None)}
    found = asyncio.run(engine_gauges(engines))  # type: ignore[arg-type]
    assert found[f.ENGINE_UP.series("well")] == 1
    assert found[f.ENGINE_RESTARTS.series("well")] == 2
    assert {series: value for series, value in found.items() if "down" in series} == {
        f.ENGINE_UP.series("down"): 0
    }
