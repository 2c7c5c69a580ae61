"""What exchanges may use and have used: budgets hold and charge it, one record of each is kept."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Protocol

from models.errors import EngineError
from policies.base import Policy
from policies.footprint import Footprint, estimate
from policies.plan import Plan, answers
from router.access.budgets import Budgets
from router.access.limits import NOTHING, Amounts
from router.access.store import used_amounts
from router.catalog.catalog import Catalog
from router.engines import EngineClient
from router.exchange import Exchange
from router.executor.trace import Run
from router.ledger.writer import Ledger
from router.record import RequestRecord
from router.turns import one_by_one

logger = logging.getLogger(__name__)


class Watcher(Protocol):
    """Is told of every request when it is over."""

    def ended(self, exchange: Exchange, record: RequestRecord) -> None:
        """Take note; must neither block nor raise."""
        ...

    def close(self) -> None:
        """Hand on what is still held; may block."""
        ...


class Accounts:
    """What exchanges used: asked of the engines, charged, kept in the ledger, told to watchers."""

    def __init__(
        self,
        engines: Mapping[str, EngineClient],
        budgets: Budgets,
        ledger: Ledger,
        watchers: Sequence[Watcher],
        *,
        keep_text: bool,
        user_secret: bytes,
    ) -> None:
        """Keep records in `ledger`, with the texts if `keep_text`; users are hashed."""
        self._engines = engines
        self._budgets = budgets
        self._ledger = ledger
        self._watchers = tuple(watchers)
        self._keep_text = keep_text
        self._user_secret = user_secret
        self.settling: set[asyncio.Task[None]] = set()

    async def admit(self, exchange: Exchange) -> None:
        """Hold the most that the exchange's choices may use, in every budget that counts it.

        Waits a bounded time. Raises `BudgetExhausted` and `BudgetUnavailable`.
        """
        counts = self._budgets.counts(exchange.key)
        estimate = most(exchange, exchange.catalog) if counts else NOTHING
        exchange.reservation = await self._budgets.reserve(
            request_id=exchange.id, key=exchange.key, estimate=estimate
        )

    def end(self, exchange: Exchange) -> None:
        """Keep the record of `exchange`, at once or when what was cut off is known."""
        if not any(True for choice in exchange.choices for _ in choice.trace.interrupted()):
            # In the loop's next turn: when the response is on its way.
            asyncio.get_running_loop().call_soon(self._record, exchange)
            return
        self._begin(self._settle_and_record(exchange))

    async def settle(self, exchange: Exchange) -> None:
        """Ask the engines what the requests used that were cancelled there."""

        async def settle(run: Run) -> None:
            assert run.engine is not None
            assert run.request_id is not None
            run.settled = True
            try:
                used = await self._engines[run.engine].settle(run.request_id)
            except Exception as error:
                # The engine is gone; what reached us stays counted.
                if not isinstance(error, EngineError | TimeoutError):
                    logger.exception("%s: cannot be settled", exchange.id)
                return
            run.output_tokens = max(run.output_tokens, used.num_tokens)
            run.energy = run.energy or used.energy

        interrupted = [run for choice in exchange.choices for run in choice.trace.interrupted()]
        await asyncio.gather(*map(settle, interrupted))

    async def close(self) -> None:
        """Wait for the records of requests that were cut off, then close what keeps them."""
        while self.settling:
            await asyncio.gather(*self.settling, return_exceptions=True)
        await asyncio.gather(self._ledger.close(), self._budgets.close())
        for watcher in self._watchers:
            await asyncio.to_thread(watcher.close)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self.settling.add(task)
        task.add_done_callback(self.settling.discard)

    async def _settle_and_record(self, exchange: Exchange) -> None:
        await self.settle(exchange)
        self._record(exchange)

    def _record(self, exchange: Exchange) -> None:
        record = exchange.complete(
            exchange.catalog.prices.rates, keep_text=self._keep_text, user_secret=self._user_secret
        )
        if exchange.reservation is not None and exchange.reservation.counted:
            self._budgets.settle(exchange.reservation, used_amounts(record))
        self._ledger.record(record)
        for watcher in self._watchers:
            watcher.ended(exchange, record)
        policy = exchange.catalog.policies.get(record.policy or "")
        if policy is not None:
            self._begin(self._tell(policy, exchange))

    async def _tell(self, policy: Policy, exchange: Exchange) -> None:
        """Tell who decided what each of the decisions has cost, and others run in between."""
        catalog = exchange.catalog
        async for query, decision, cost in one_by_one(exchange.settled(catalog.prices.rates)):
            policy.settle(query, decision, cost)
            catalog.policies.limiter.observe(query, decision, cost)


def most(exchange: Exchange, catalog: Catalog) -> Amounts:
    """Return the most that answering may use: every stage of every choice and of what may
    take over from it, to its last token.
    """
    tokens, costs = exchange.record.prompt_tokens, list[Footprint]()
    for choice in exchange.choices[:: max(1, exchange.n)]:
        query = choice.task.query
        plans = (choice.plan, *choice.fallback)
        sizes = [
            _most_output(plan, query.prompt_tokens, query.max_tokens, catalog) for plan in plans
        ]
        tokens += exchange.n * max(sizes)
        for plan, output_tokens in zip(plans, sizes, strict=True):
            cost = estimate(
                plan,
                catalog.prices.rates,
                prompt_tokens=query.prompt_tokens,
                output_tokens=output_tokens,
            )
            costs += [cost] * exchange.n
    return Amounts.of(tokens=tokens, cost=Footprint.together(costs))


def _most_output(plan: Plan, prompt_tokens: int, max_tokens: int, catalog: Catalog) -> int:
    """Return the most tokens an answer can have: `max_tokens`, or what the context leaves."""
    contexts = [catalog.members.context_tokens(answer) for answer in answers(plan)]
    rooms = [max_tokens if size is None else size - prompt_tokens for size in contexts]
    return max(0, min(max_tokens, max(rooms)))
