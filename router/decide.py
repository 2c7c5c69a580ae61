"""From what a request asks for to the plans that will run: one decision per prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace

from models.engines.base import SamplingOptions
from policies.base import Decision, Policy, Query
from policies.errors import PlanError, PolicyError
from policies.footprint import NO_LIMITS, Footprint, Limits, estimate
from policies.plan import Answer, Plan, PlanBounds, answers, from_json, members, num_lanes
from router.catalog.catalog import Catalog, Target
from router.catalog.members import Members
from router.config import ServingLimits
from router.conversations import Conversations, answers_call, stay
from router.eligible import able_plans, among_able
from router.errors import ApiError, bad_request
from router.exchange import Choice, Exchange
from router.executor.task import INLINE_CHARACTERS, Prompt, Task
from router.experiments.experiments import Experiments
from router.openai_api.endpoint import Ask
from router.turns import one_by_one


async def decide(
    catalog: Catalog,
    limits: ServingLimits,
    exchange: Exchange,
    ask: Ask,
    experiments: Experiments,
    conversations: Conversations,
) -> None:
    """Fill in the exchange's policy, decisions and choices.

    An experiment may choose the policy, unless the body names one or a plan. Raises `ApiError` for
    unknown names, plans that cannot run and ceilings that the plan exceeds.
    """
    target = _target(catalog, ask, limits.plans)
    if target.policy_name is None:
        _check_encodes(catalog.members, target.policy.plans(), ask.prompts[0])
    queries = [
        await _query(catalog, limits, exchange, ask, prompt)
        async for prompt in one_by_one(ask.prompts)
    ]
    exchange.record.prompt_tokens = sum(query.prompt_tokens for query in queries)
    if ask.extension.policy is None and ask.extension.plan is None:
        arm_policy = experiments.place(exchange, ask, queries[0])
        if arm_policy is not None:
            target = Target(policy=catalog.policies[arm_policy], policy_name=arm_policy)
    exchange.record.policy = target.policy_name
    decisions: list[Decision] = []
    choices: list[Choice] = []
    made: list[tuple[Query, Decision]] = []
    try:
        async for query, prompt in one_by_one(zip(queries, ask.prompts, strict=True)):
            decision = await _decided(target.policy, query)
            made.append((query, decision))
            unlimited = target.policy_name is not None and not decision.limited
            if unlimited and query.limits != NO_LIMITS:
                decision = catalog.policies.limiter.choose(query, decision)
            fallback: tuple[Plan, ...] = ()
            if target.policy_name is not None:
                last = await conversations.last(exchange, prompt)
                if last is not None and await _able(catalog, last, ask, prompt, query):
                    margin = catalog.policies.margins[target.policy_name]
                    decision = stay(decision, last, margin=margin, in_call=answers_call(prompt))
                decision, fallback = await _narrowed(catalog, target, ask, prompt, query, decision)
            num_read = await most_read((decision.plan, *fallback), catalog.members, prompt)
            read = replace(query, prompt_tokens=num_read)
            _check_ceilings(catalog, decision, read)
            decisions.append(decision)
            sampling = replace(ask.sampling, logprobs=ask.logprobs or ask.extension.explain)
            for i in range(len(choices), len(choices) + ask.n):
                task = _task(exchange, ask, prompt=prompt, sampling=sampling, query=read, i=i)
                choices.append(Choice(plan=decision.plan, task=task, fallback=fallback))
    except BaseException:
        for query, decision in made:
            target.policy.settle(query, decision, Footprint())  # nothing of it will run
        raise
    exchange.decisions = tuple(decisions)
    exchange.choices = tuple(choices)
    exchange.record.prompt_tokens = exchange.prompt_tokens
    _check_lanes(exchange, limits.plans.lanes)


def _check_encodes(pool: Members, plans: Iterable[Plan], prompt: Prompt) -> None:
    """Refuse who was asked by name and cannot take it, before a long text is read for it."""
    for plan in plans:
        for answer in answers(plan):
            pool.check_encodes(answer, prompt.encoding)


async def _decided(policy: Policy, query: Query) -> Decision:
    """Return what `policy` decides, of a long text in a thread.

    A thread goes on when its request is cancelled: what it decides then costs nothing.
    """
    if len(query.text) + sum(map(len, query.earlier)) <= INLINE_CHARACTERS:
        return policy.decide(query)

    def drop(deciding: asyncio.Task[Decision]) -> None:
        if deciding.exception() is None:
            policy.settle(query, deciding.result(), Footprint())

    deciding = asyncio.create_task(asyncio.to_thread(policy.decide, query))
    try:
        return await asyncio.shield(deciding)
    except asyncio.CancelledError:
        deciding.add_done_callback(drop)
        raise


async def _narrowed(
    catalog: Catalog, target: Target, ask: Ask, prompt: Prompt, query: Query, decision: Decision
) -> tuple[Decision, tuple[Plan, ...]]:
    """Return a policy's decision among those who can take the request, and what follows it."""
    assert target.policy_name is not None
    plans = catalog.policies.fallbacks[target.policy_name]
    fallback = await able_plans(plans, pool=catalog.members, ask=ask, prompt=prompt)
    decision = await among_able(
        decision, target.policy, pool=catalog.members, ask=ask, prompt=prompt, fallback=fallback
    )
    return decision, tuple(
        plan for plan in fallback if plan != decision.plan and not _exceeded(catalog, plan, query)
    )


async def most_read(plans: Iterable[Plan], pool: Members, prompt: Prompt) -> int:
    """Return how many tokens `prompt` has for the one of the plans' members that reads most.

    Each reads it in its own tokenizer and template.
    """
    names = dict.fromkeys(name for plan in plans for name in members(plan))
    return max([await prompt.count(pool.tokenizer_of(name)) for name in names])


async def _able(catalog: Catalog, answer: Answer, ask: Ask, prompt: Prompt, query: Query) -> bool:
    """Return whether `answer`, once given, can still be, takes the request, and is affordable."""
    try:
        catalog.policies.check(answer)
    except PolicyError:
        return False
    if query.limits.caps_cost and _exceeded(catalog, answer, query):
        return False
    return await able_plans([answer], pool=catalog.members, ask=ask, prompt=prompt) == (answer,)


async def _query(
    catalog: Catalog, limits: ServingLimits, exchange: Exchange, ask: Ask, prompt: Prompt
) -> Query:
    tokenizer = catalog.members.tokenizer
    prompt.check_size(catalog.members.most_token_bytes, catalog.members.most_context_tokens)
    return Query(
        text=await prompt.query(tokenizer),
        earlier=prompt.earlier(),
        prompt_tokens=await prompt.count(tokenizer),
        max_tokens=limits.default_max_tokens if ask.max_tokens is None else ask.max_tokens,
        user=exchange.user,
        session=exchange.record.session,
        key_id=exchange.key_id,
        limits=Limits.of(ask.extension),
        explain=ask.extension.explain,
    )


def named_target(catalog: Catalog, name: str) -> Target:
    """Return what a served name stands for; raises `ApiError`, 404."""
    if name not in catalog.targets:
        raise ApiError(
            404,
            f"The model {name!r} does not exist; GET /v1/models lists what there is.",
            param="model",
            code="model_not_found",
        )
    return catalog.targets[name]


def _target(catalog: Catalog, ask: Ask, bounds: PlanBounds) -> Target:
    named = named_target(catalog, ask.model)
    extension = ask.extension
    if extension.plan is not None and extension.policy is not None:
        raise bad_request("give a plan or a policy, not both", "shoal.plan")
    if extension.policy is not None:
        if extension.policy not in catalog.policies:
            raise bad_request(
                f"shoal.policy: {extension.policy!r} is unknown; "
                f"allowed are {', '.join(catalog.policies)}",
                "shoal.policy",
            )
        return Target(policy=catalog.policies[extension.policy], policy_name=extension.policy)
    if extension.plan is not None:
        plan = _read_plan(catalog, extension.plan, bounds)
        return Target(policy=catalog.policies.fixed(plan), policy_name=None)
    return named


def _read_plan(catalog: Catalog, data: object, bounds: PlanBounds) -> Plan:
    try:
        plan = from_json(data, bounds)
        catalog.policies.check(plan)
    except (PlanError, PolicyError) as error:
        raise bad_request(f"shoal.plan: {error}", "shoal.plan") from None
    return plan


def _check_lanes(exchange: Exchange, most: int) -> None:
    """Refuse a request whose choices would hold more lanes at once than anybody may."""
    lanes = sum(num_lanes(choice.plan) for choice in exchange.choices)
    if lanes > most:
        raise bad_request(
            f"n: the request's {len(exchange.choices)} choices take {lanes} lanes together; "
            f"at most {most} are allowed",
            "n" if len(exchange.choices) > 1 else "shoal.plan",
        )


def _check_ceilings(catalog: Catalog, decision: Decision, query: Query) -> None:
    if not query.limits.caps_cost:
        return
    # A controller has measured latencies, which no rate knows.
    slow = "max_latency_s" in decision.details.get("budget", {}).get("unmet", ())
    for name in (*_exceeded(catalog, decision.plan, query), *(["max_latency_s"] if slow else [])):
        raise bad_request(
            f"shoal.{name}: the plan may cost more; lower max_tokens or raise the ceiling",
            f"shoal.{name}",
            "cost_ceiling_exceeded",
        )


def _exceeded(catalog: Catalog, plan: Plan, query: Query) -> tuple[str, ...]:
    """Return the request's ceilings that `plan` may exceed."""
    cost = estimate(
        plan,
        catalog.prices.rates,
        prompt_tokens=query.prompt_tokens,
        output_tokens=query.max_tokens,
    )
    return tuple(query.limits.exceeded(cost))


def _task(
    exchange: Exchange, ask: Ask, *, prompt: Prompt, sampling: SamplingOptions, query: Query, i: int
) -> Task:
    if sampling.seed is not None and ask.n > 1:
        # Choices of one prompt differ, and are still the same whenever they are asked for.
        seed = sampling.seed + i % ask.n
        sampling = replace(sampling, seed=(seed + 2**63) % 2**64 - 2**63)
    return Task(
        request_id=f"{exchange.id}-{i}",
        query=query,
        prompt=prompt,
        sampling=sampling,
        max_tokens=ask.max_tokens,
        stream=ask.stream,
        client_id=exchange.client_id,
        client_weight=exchange.key.weight if exchange.key and not exchange.offline else 1.0,
        sent=ask.sent,
        ceiling=ask.ceiling,
        offline=exchange.offline,
        deadline_s=exchange.deadline_s,
    )
