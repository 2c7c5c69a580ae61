"""Who may send a request, and whether their budget has room for it.

A request passes three times: `identify` reads its key, `admit` holds its estimate once its plan is
known, `settle` charges what it used once its record is.
"""

from __future__ import annotations

from collections.abc import Mapping

from policies.footprint import Footprint, estimate
from policies.plan import Plan, answers
from router.access.authentication import Authenticator
from router.access.budgets import Budgets
from router.access.keys import Key, Scope
from router.access.limits import Amounts, BudgetsConfig
from router.access.store import used_amounts
from router.catalog.catalog import Catalog
from router.exchange import Exchange
from router.record import RequestRecord
from router.workers import Worker


class Gate:
    """Keys and budgets of one replica."""

    def __init__(self, *, authenticator: Authenticator, budgets: Budgets) -> None:
        self._authenticator = authenticator
        self._budgets = budgets

    async def identify(self, authorization: str | None, *, scope: Scope = "user") -> Key | None:
        """Return the key that an Authorization header brings; None for an anonymous request.

        Raises `KeyRejected`.
        """
        return await self._authenticator.authenticate(authorization, scope=scope)

    async def key(self, key_id: str | None) -> Key | None:
        """Return the key that was once identified as `key_id`; raises `KeyRejected`."""
        return None if key_id is None else await self._authenticator.known(key_id)

    async def admit(self, exchange: Exchange, catalog: Catalog) -> None:
        """Hold the most that the exchange's choices may use, in every budget that counts it.

        Waits a bounded time. Raises `BudgetExhausted` and `BudgetUnavailable`.
        """
        exchange.reservation = await self._budgets.reserve(
            request_id=exchange.id, key=exchange.key, estimate=most(exchange, catalog)
        )

    def configure(self, budgets: BudgetsConfig) -> None:
        """Hold new requests to these caps."""
        self._budgets.configure(budgets)

    def settle(self, exchange: Exchange, record: RequestRecord) -> None:
        """Charge what `record` says; neither blocks nor raises."""
        if exchange.reservation is not None:
            self._budgets.settle(exchange.reservation, used_amounts(record))

    @property
    def worker(self) -> Worker:
        """What settles the budgets."""
        return self._budgets.worker

    async def close(self) -> None:
        """Charge what is still to be charged; idempotent."""
        await self._budgets.close()


def credentials(headers: Mapping[str, str]) -> str | None:
    """Return what a request says of itself as OpenAI's clients do; Anthropic's use `x-api-key`."""
    key = headers.get("x-api-key")
    return headers.get("authorization") or (f"Bearer {key}" if key else None)


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
