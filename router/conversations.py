"""Who answered a conversation last, so that its next turn may stay there.

A turn is worth staying for: whoever answered has read the conversation and may still have it in a
cache, and only the model that called a tool knows why it did. A conversation is known by its
session (`shoal.session`, `prompt_cache_key`, a header), else by its beginning and its user: what
stands before the last answer is all that the request before this one had. So nothing but the
conversation itself has to come back. Who answered is remembered in this process, and in the
ledger's rows for other replicas and for later.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from policies.base import Decision
from policies.errors import PlanError
from policies.plan import Answer, from_json, to_json
from router.exchange import Exchange
from router.executor.task import Prompt
from router.ledger.database import Database
from router.ledger.schema import REQUESTS

_MOST_REMEMBERED: Final = 10_000  # what is older, the database knows
# Nobody waits longer for the database to know a conversation.
_PATIENCE_S: Final = 0.25


class Conversations:
    """Remembers by which `Answer` each conversation went on last."""

    def __init__(self, database: Database, secret: bytes) -> None:
        """Conversations have names in the ledger that the `secret` hides."""
        self._database = database
        self._secret = secret
        self._answers: OrderedDict[str, Answer] = OrderedDict()

    async def last(self, exchange: Exchange, prompt: Prompt) -> Answer | None:
        """Return who gave the last answer in `prompt`'s conversation; None where nobody knows.

        A database that does not answer knows nothing.
        """
        if prompt.messages is None or prompt.said_before is None:
            return None
        name = self._name(exchange, prompt.said_before)
        if name in self._answers:
            return self._answers[name]
        found = await self._look_up(name)
        try:
            plan = None if found is None else from_json(found)
        except PlanError:
            return None  # of another version
        return plan if isinstance(plan, Answer) else None

    async def _look_up(self, name: str) -> Mapping[str, Any] | None:
        looking = asyncio.ensure_future(self._database.calls.run(self._find, name))
        looking.add_done_callback(_ignore)
        # Cancelling a call waits for its end, which a database that hangs does not come to.
        done, _ = await asyncio.wait({looking}, timeout=_PATIENCE_S)
        try:
            return looking.result() if done else None
        except SQLAlchemyError:
            return None

    def note(self, exchange: Exchange) -> None:
        """Remember who answered, here and in the exchange's record."""
        if len(exchange.choices) != 1 or exchange.record.status != 200:
            return
        [choice] = exchange.choices
        answer, prompt = choice.trace.accepted(), choice.task.prompt
        if answer is None or prompt.messages is None:
            return
        name = self._name(exchange, prompt.said)
        exchange.record.conversation = name
        exchange.record.answered_with = to_json(answer)
        self._answers[name] = answer
        self._answers.move_to_end(name)
        if len(self._answers) > _MOST_REMEMBERED:
            self._answers.popitem(last=False)

    def _name(self, exchange: Exchange, said: bytes) -> str:
        """Return the name of the conversation in which so much was `said`, or of its session."""
        digest = hashlib.blake2b(key=self._secret[:64], digest_size=12)
        session = exchange.record.session
        whose: list[Any] = [exchange.key_id, session or exchange.user, session is not None]
        digest.update(json.dumps(whose).encode() + b"\n")
        if not session:
            digest.update(said)
        return digest.hexdigest()

    def _find(self, name: str) -> Mapping[str, Any] | None:
        wanted = (
            sa.select(REQUESTS.c.answered_with)
            .where(REQUESTS.c.conversation == name)
            .order_by(REQUESTS.c.time_s.desc())
            .limit(1)
        )
        row = self._database.row(wanted)
        return None if row is None else row["answered_with"]


def _ignore(call: asyncio.Future[Any]) -> None:
    """Take note of how a late call ended, so that nobody else has to."""
    if not call.cancelled():
        call.exception()


def answers_call(prompt: Prompt) -> bool:
    """Return whether the conversation ends with the results of calls that its last answer made."""
    messages = prompt.messages or ()
    return bool(messages) and messages[-1]["role"] == "tool"


def stay(decision: Decision, last: Answer, *, margin: float, in_call: bool) -> Decision:
    """Return `decision`, or one for `last`, who answered before, where changing is not worth it.

    It is worth it for a predicted quality that is higher by more than `margin`. Where the policy
    chose against its predictions, or knows nothing like the query, it has its reasons. Who called a
    tool gets the result, `in_call`.
    """
    if decision.plan == last:
        return decision
    why = "who made the call gets its result"
    if not in_call:
        plan, scores = decision.plan, decision.scores
        alone = isinstance(plan, Answer) and len(plan.members) == len(last.members) == 1
        if not isinstance(plan, Answer) or not alone or decision.familiar is False:
            return decision
        new, old = scores.get(plan.members[0]), scores.get(last.members[0])
        if new is None or old is None or not 0 <= new - old <= margin:
            return decision
        why = f"changing gains {new - old:.3f}, not more than {margin:g}"
    return replace(
        decision,
        plan=last,
        reason=f"{decision.reason}; the conversation stays with {', '.join(last.members)}: {why}",
    )
