"""Which members can take a request, and a policy's choice cut down to them.

What a member can do is known before anything runs: tools, log-probabilities, structured output,
the length of its context. A policy chooses by the query alone, so what it chose is cut down here:
members that cannot take the request leave its plan, and where nobody is left, the one of the
policy's other models takes it for which most quality is predicted. Where none of them can, the plan
stays, and who runs it says what is missing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from models.engines.requests import check_sampling
from models.errors import RequestError
from policies.base import Decision, Policy, members_of
from policies.plan import Answer, Plan, answers, children, members, with_parts
from router.catalog.members import Members
from router.executor.task import Prompt
from router.openai_api.endpoint import Ask


async def able_plans(
    plans: Iterable[Plan], *, pool: Members, ask: Ask, prompt: Prompt
) -> tuple[Plan, ...]:
    """Return what is left of `plans` with the members that can take the request."""
    left = [without(plan, await _unable(members(plan), pool, ask, prompt)) for plan in plans]
    return tuple(plan for plan in left if plan is not None)


async def among_able(
    decision: Decision,
    policy: Policy,
    *,
    pool: Members,
    ask: Ask,
    prompt: Prompt,
    fallback: Sequence[Plan] = (),
) -> Decision:
    """Return `decision` with a plan of members that can take the request, if there is one.

    Where none of the policy's can, the first plan of `fallback` takes it, of which all can.
    Its details then name those that were left out, and why.
    """
    left_out = await _unable(members(decision.plan), pool, ask, prompt)
    if prompt.tools is not None:
        left_out |= _other_ways(decision.plan, pool, left_out)
    if not left_out:
        return decision
    plan = without(decision.plan, left_out)
    if plan is None:
        others = [name for name in members_of(policy) if name not in left_out]
        left_out |= await _unable(others, pool, ask, prompt)
        able = [name for name in others if name not in left_out]
        if not able and not fallback:
            return decision
        plan = fallback[0] if not able else Answer(members=(_likeliest(able, decision),))
    return replace(
        decision,
        plan=plan,
        reason=f"{decision.reason}; without {', '.join(left_out)}, who cannot take the request",
        details={**decision.details, "left_out": left_out},
    )


def _likeliest(names: Sequence[str], decision: Decision) -> str:
    return max(names, key=lambda name: decision.scores.get(name, 0.0))


def without(plan: Plan, names: Collection[str]) -> Plan | None:
    """Return what is left of `plan` without the members `names`; None if that is nothing.

    Fusions whose members have different parts fall with any of them.
    """
    if isinstance(plan, Answer):
        return _smaller(plan, names)
    parts = enumerate(without(part, names) for part in children(plan))
    kept = {place: part for place, part in parts if part is not None}
    return with_parts(plan, kept) if len(kept) > 1 else next(iter(kept.values()), None)


def _smaller(answer: Answer, names: Collection[str]) -> Answer | None:
    kept = [index for index, name in enumerate(answer.members) if name not in names]
    if len(kept) == len(answer.members):
        return answer
    if not kept or answer.rule in ("gated", "contrastive"):
        return None
    weights = tuple(answer.weights[index] for index in kept) if answer.weights else None
    return replace(
        answer,
        members=tuple(answer.members[index] for index in kept),
        weights=weights if weights and any(weights) else None,
    )


async def _unable(
    names: Collection[str], pool: Members, ask: Ask, prompt: Prompt
) -> dict[str, str]:
    """Return who of `names` cannot take the request, and what it lacks."""
    lacking: dict[str, str] = {}
    for name in names:
        try:
            await _check(name, pool, ask, prompt)
        except RequestError as error:
            lacking[name] = str(error)
    return lacking


def _other_ways(plan: Plan, pool: Members, left_out: Collection[str]) -> dict[str, str]:
    """Return whom the first of a fusion that is left cannot call tools with, together."""
    found: dict[str, str] = {}
    for answer in answers(plan):
        able = [name for name in answer.members if name not in left_out]
        for name in able[1:]:
            try:
                pool.check_tools(Answer(members=(able[0], name)))
            except RequestError as error:
                found[name] = str(error)
    return found


async def _check(name: str, pool: Members, ask: Ask, prompt: Prompt) -> None:
    """Raise `RequestError` if the member called `name` cannot take the request."""
    answer = Answer(members=(name,))
    pool.check_encodes(answer, prompt.encoding)
    if prompt.encoding is not None:
        return
    if prompt.tools is not None:
        pool.check_tools(answer)
    if prompt.media is not None:
        pool.check_media(answer, prompt.media.kind, prompt.media.field)
    if prompt.token_ids is not None:
        pool.check_ids(name)
    check_sampling(ask.sampling, pool.traits_of(name))
    context_tokens = pool.context_tokens(answer)
    wanted = 1 if ask.ceiling else ask.max_tokens or 1
    if context_tokens is not None:
        num_tokens = len(await prompt.tokens(pool.tokenizer_of(name)))
        if num_tokens + wanted > context_tokens:
            raise RequestError(
                f"its context holds {context_tokens} tokens, but the prompt has {num_tokens} and "
                f"the answer may take {wanted}"
            )
