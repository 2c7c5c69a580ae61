"""A replica that spends a budget until it is exhausted; run as a script, it writes what it used.

Arguments: the database's address, the cap in tokens, a name. Each line is a request's id and its
tokens, written just before the request is settled.
"""

import asyncio
import logging
import sys
import time
from random import Random

from policies.footprint import Cost
from router.access.budgets import Budgets
from router.access.limits import Amounts, BudgetExhausted, BudgetsConfig, BudgetUnavailable
from router.ledger.database import open_database
from router.ledger.writer import Ledger
from router.metrics.counting import count_rows
from tests.router.ledger.records import record

MAX_TOKENS = 100
# Longer than any test: a slow machine must not end the lease of a replica that lives.
LEASE_S = 600


async def spend(url: str, cap_tokens: int, name: str) -> None:
    """Run 50 clients; some leave while they wait, all go on until the budget is spent."""
    logger = logging.getLogger(name)
    config = BudgetsConfig(server={"tokens_per_month": cap_tokens}, wait_s=60, lease_s=LEASE_S)
    budgets = Budgets(open_database(url, fast_commits=True), config, holder=name, logger=logger)
    ledger = Ledger(
        open_database(url),
        flush_interval_s=0.05,
        close_timeout_s=120,
        count=count_rows,
        logger=logger,
    )

    async def client(number: int) -> None:
        random = Random(f"{name} {number}")
        turn = 0
        while True:
            turn += 1
            request_id = f"{name}-{number}-{turn}"
            estimate = Amounts.of(tokens=MAX_TOKENS, cost=Cost())
            reserving = budgets.reserve(request_id=request_id, key=None, estimate=estimate)
            try:
                patience_s = 0.001 if random.random() < 0.1 else None
                reservation = await asyncio.wait_for(reserving, patience_s)
            except (TimeoutError, BudgetUnavailable):
                continue
            except BudgetExhausted as error:
                if error.final:
                    return
                continue
            await asyncio.sleep(random.random() * 0.02)
            used = random.randint(1, MAX_TOKENS)
            sys.stdout.write(f"{request_id} {used}\n")
            sys.stdout.flush()
            fields = {"request_id": request_id, "time_s": time.time(), "prompt_tokens": 0}
            ledger.record(record(0, **fields, output_tokens=used))
            budgets.settle(reservation, Amounts.of(tokens=used, cost=Cost()))

    await asyncio.gather(*map(client, range(50)))
    await ledger.close()
    await budgets.close()


if __name__ == "__main__":
    asyncio.run(spend(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
