"""Judging answers: as scorers see them, and by the votes they give each other.

The scorers themselves come with the policies.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence

from models.engines.base import Chunk, Token
from models.errors import EngineError, RequestError
from policies.base import Query
from policies.cascade.base import Attempt, BatchScorer, Reading, Scorer, normalise
from policies.fused import without_prior
from policies.outcomes import AnswerLogprobs
from policies.plan import Best, Plan


def attempt(
    query: Query, plan: Plan, answer: Chunk, earlier: tuple[str, ...] = (), *, finished: bool = True
) -> Attempt:
    """Return `answer` (all its chunks merged into one) of the stage `plan` for a scorer."""
    known = logprobs(answer.tokens)
    return Attempt(
        query=query.text,
        plan=without_prior(plan),
        answer=answer.text,
        logprob_mean=known.mean if known else 0.0,
        logprob_min=known.min if known else 0.0,
        num_tokens=sum(not token.thought for token in answer.tokens),
        entropy_mean=known.entropy if known else None,
        earlier=earlier,
        finished=finished,
    )


def logprobs(tokens: Sequence[Token]) -> AnswerLogprobs | None:
    """Return what scorers see of an answer's tokens; None where no log-probability is known.

    They see nothing of what came before the answer, its reasoning.
    """
    told = [token for token in tokens if not token.thought]
    known = [token.logprob for token in told if token.logprob is not None]
    entropies = [token.entropy for token in told if token.entropy is not None]
    if not known:
        return None
    return AnswerLogprobs(
        mean=math.fsum(known) / len(known),
        min=min(known),
        num_tokens=len(told),
        # Rounding may leave a sure thing's entropy just below zero.
        entropy=max(math.fsum(entropies) / len(entropies), 0.0) if entropies else None,
    )


def reading(first: Chunk) -> Reading | None:
    """Return what an answer's `first` chunk tells of its prompt; None where it tells nothing."""
    known = [token.logprob for token in first.prompt if token.logprob is not None]
    if not known:
        return None
    return Reading(
        logprob_mean=math.fsum(known) / len(known),
        logprob_min=min(known),
        entropy=first.tokens[0].entropy if first.tokens else None,
        state_D=None if first.rows is None else first.rows[0],
    )


async def scores(scorer: Scorer, attempts: Sequence[Attempt]) -> list[float]:
    """Return P(correct) of every attempt; a slow scorer gets a thread of its own meanwhile."""
    if isinstance(scorer, BatchScorer):
        return await asyncio.to_thread(scorer.score_batch, attempts)
    return [scorer.score(one) for one in attempts]


def decided(votes: Sequence[str], num_open: int) -> bool:
    """Return whether `num_open` further votes cannot change the winner of `votes`.

    They cannot if the leader stays ahead of the second even when all of them go to it.
    """
    ranked = Counter(votes).most_common(2)
    if not ranked:
        return False
    second = ranked[1][1] if len(ranked) > 1 else 0
    return ranked[0][1] > second + num_open


async def until_decided(best: Best, running: Sequence[asyncio.Task[Chunk]]) -> None:
    """Wait for the candidates, or until a majority stands; raise what no engine may raise."""
    pending = set(running)
    while pending:
        _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        for one in running:
            error = one.exception() if one.done() and not one.cancelled() else None
            if error is not None and not isinstance(error, EngineError | RequestError):
                raise error
        votes = [normalise(one.result().text) for one in running if answered(one)]
        if best.select == "majority" and decided(votes, len(pending)):
            return


def answered(task: asyncio.Task[Chunk]) -> bool:
    """Return whether a candidate has given its answer."""
    return task.done() and not task.cancelled() and task.exception() is None
