"""Budgets of replicas on one database, and the clock by which they count."""

import logging
from collections.abc import Iterator

import pytest

from router.access.budgets import Budgets
from router.access.limits import BudgetsConfig
from router.ledger.database import Database, open_database
from tests.clock import Clock
from tests.router.access.budgeting import NOW_S, NewBudgets


@pytest.fixture
def clock() -> Clock:
    """A clock at a whole minute."""
    return Clock(NOW_S)


@pytest.fixture
def new_budgets(ledger_url: str, database: Database, clock: Clock) -> Iterator[NewBudgets]:
    """Make replicas' budgets, each with connections of its own; they are stopped afterwards."""
    made: list[Budgets] = []

    def make(**config: object) -> Budgets:
        made.append(
            Budgets(
                open_database(ledger_url),
                BudgetsConfig.model_validate(config),
                holder=f"replica-{len(made)}",
                logger=logging.getLogger("test.budgets"),
                clock=clock,
            )
        )
        return made[-1]

    yield make
    for budgets in made:
        budgets.stop()
