"""One HTTP request for an answer, from its arrival to its record."""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from policies.base import Decision, Query
from policies.footprint import Footprint, Rates
from policies.plan import Plan, to_json
from router.caps.budgets import Reservation
from router.digest import answer_digest
from router.executor.task import Task
from router.executor.trace import Trace
from router.keys import Key
from router.openai_api.ask import Ask
from router.record import MemberCost, MemberTokens, RequestRecord

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")

USER_HEADER, SESSION_HEADER = "x-shoal-user", "x-shoal-session"
_MOST_CHARACTERS = 256

CLIENT_CLOSED_REQUEST = 499  # nginx's; the client never sees it


@dataclass(kw_only=True)
class Choice:
    """One answer to generate, and what ran for it."""

    plan: Plan
    task: Task
    trace: Trace = field(default_factory=Trace)


@dataclass(kw_only=True)
class Exchange:
    """What is known of a request while it is served; every part of `record` is filled in here.

    `time_s` is Unix time, `started_s` and `ended_s` count seconds of `time.perf_counter`. `user`
    and `session` come from headers until the body names them. `experiment` to `expected_quality`
    are `RequestRecord`'s. `traceparent` is the W3C header of the trace that the client is in.
    `cached_tokens` of the prompt had been read before; None where no engine says. `answer` gathers
    the first choice's text. At `deadline_s`, by the event
    loop's clock, the request is ended.
    """

    id: str
    endpoint: str
    client_request_id: str
    time_s: float
    traceparent: str | None = None
    started_s: float = field(default_factory=time.perf_counter)
    deadline_s: float | None = None
    ended_s: float | None = None
    first_text_s: float | None = None
    ask: Ask | None = None
    policy: str | None = None
    decisions: tuple[Decision, ...] = ()
    choices: tuple[Choice, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    status: int = CLIENT_CLOSED_REQUEST
    error: str | None = None
    key: Key | None = None
    reservation: Reservation | None = None
    user: str | None = None
    session: str | None = None
    experiment: str | None = None
    arm: str | None = None
    unit: str | None = None
    propensity: float | None = None
    expected_quality: float | None = None
    answer: list[str] = field(default_factory=list)
    recorded: bool = False

    @classmethod
    def begin(cls, *, id_prefix: str, endpoint: str, headers: Mapping[str, str]) -> Exchange:
        """Return the exchange of a request that has just arrived."""
        unique = uuid.uuid4().hex
        asked = headers.get("x-request-id", "")
        return cls(
            id=id_prefix + unique,
            endpoint=endpoint,
            client_request_id=asked if _SANE_ID.fullmatch(asked) else f"req_{unique}",
            time_s=time.time(),
            traceparent=headers.get("traceparent"),
            user=_name(headers, USER_HEADER),
            session=_name(headers, SESSION_HEADER),
        )

    @property
    def key_id(self) -> str | None:
        """The id of the key that the request brought, if it brought one."""
        return self.key.id if self.key else None

    @property
    def elapsed_s(self) -> float:
        """The time since the request arrived; until it was over, if it is."""
        return (self.ended_s or time.perf_counter()) - self.started_s

    def member_tokens(self) -> dict[str, MemberTokens]:
        """Return what each member read and wrote for this request, accepted or not."""
        totals: dict[str, MemberTokens] = {}
        for choice in self.choices:
            for name, tokens in choice.trace.member_tokens().items():
                seen = totals.get(name, MemberTokens())
                totals[name] = MemberTokens(
                    prompt_tokens=seen.prompt_tokens + tokens.prompt_tokens,
                    output_tokens=seen.output_tokens + tokens.output_tokens,
                )
        return totals

    def total(self, parts: Mapping[str, Footprint]) -> Footprint:
        """Return the sum of the members' footprints, its latency as measured so far."""
        total = Footprint()
        for cost in parts.values():
            total = total.beside(cost)
        return replace(total, latency_s=self.elapsed_s)

    def member_footprints(self, rates: Mapping[str, Rates]) -> dict[str, Footprint]:
        """Return what each member has cost, measured where it could be."""
        totals: dict[str, Footprint] = {}
        for choice in self.choices:
            for name, cost in choice.trace.member_footprints(rates).items():
                totals[name] = totals.get(name, Footprint()).beside(cost)
        return totals

    def settled(self, rates: Mapping[str, Rates]) -> Iterator[tuple[Query, Decision, Footprint]]:
        """Yield each prompt's decision with what its choices have cost, and taken together."""
        num_choices = len(self.choices) // max(1, len(self.decisions))
        for index, decision in enumerate(self.decisions):
            total = Footprint()
            own = self.choices[index * num_choices : (index + 1) * num_choices]
            for choice in own:
                for cost in choice.trace.member_footprints(rates).values():
                    total = total.beside(cost)
            yield own[0].task.query, decision, replace(total, latency_s=self.elapsed_s)

    def stages(self) -> list[dict[str, Any]]:
        """Return everything that ran, in JSON; the choice's number where there are several."""
        if len(self.choices) == 1:
            return [run.to_json() for run in self.choices[0].trace.runs.values()]
        return [
            {"choice": index, **run.to_json()}
            for index, choice in enumerate(self.choices)
            for run in choice.trace.runs.values()
        ]

    def record(self, rates: Mapping[str, Rates], *, keep_text: bool = False) -> RequestRecord:
        """Return the record of the request, which is over; with the texts if they are kept."""
        assert self.ended_s is not None
        parts = self.member_footprints(rates)
        ask, cost = self.ask, self.total(parts)
        decision = self.decisions[0] if self.decisions else None
        return RequestRecord(
            request_id=self.id,
            client_request_id=self.client_request_id,
            time_s=self.time_s,
            endpoint=self.endpoint,
            model=ask.model if ask else "",
            status=self.status,
            latency_s=cost.latency_s,
            stream=bool(ask and ask.stream),
            ttft_s=None if self.first_text_s is None else self.first_text_s - self.started_s,
            error=self.error,
            policy=self.policy,
            plan=to_json(decision.plan) if decision else None,
            prompt_tokens=self.prompt_tokens,
            output_tokens=self.output_tokens,
            num_choices=len(self.choices),
            members=self.member_tokens(),
            costs={
                name: MemberCost(usd=part.usd, wh=part.wh, gco2e=part.gco2e, method=part.method)
                for name, part in parts.items()
            },
            usd=cost.usd,
            wh=cost.wh,
            gco2e=cost.gco2e,
            energy_method=cost.method or None,
            scores=decision.scores if decision else {},
            stages=tuple(self.stages()),
            user_hash=_hash(self.user) if self.user else None,
            session=self.session,
            key_id=self.key_id,
            experiment=self.experiment,
            arm=self.arm,
            unit=self.unit,
            propensity=self.propensity,
            expected_quality=self.expected_quality,
            query_text=self.choices[0].task.query.text if keep_text and self.choices else None,
            answer_text="".join(self.answer) if keep_text and self.answer else None,
            answer_digest=(
                answer_digest(self.id, "".join(self.answer)) if self.status < 400 else None
            ),
        )


def _hash(user: str) -> str:
    return hashlib.sha256(user.encode()).hexdigest()[:16]


def _name(headers: Mapping[str, str], header: str) -> str | None:
    return headers.get(header, "")[:_MOST_CHARACTERS] or None
