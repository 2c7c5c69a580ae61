"""One HTTP request for an answer, from its arrival to its record; what the answer tells of it."""

from __future__ import annotations

import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from models.engines.base import Chunk
from policies.base import Decision, Query
from policies.cascade.base import normalise
from policies.footprint import Footprint, Rates, explain_methods
from policies.plan import Answer, Plan, to_json
from router.access.budgets import Reservation
from router.access.keys import Key
from router.catalog.catalog import Catalog
from router.config import ServingLimits
from router.executor.judging import logprobs
from router.executor.task import Task
from router.executor.trace import Trace, tokens_of
from router.openai_api.endpoint import Ask
from router.record import MemberTokens, RequestRecord, who_ran

_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")

USER_HEADER, SESSION_HEADER = "x-shoal-user", "x-shoal-session"
_MOST_CHARACTERS = 200


@dataclass(kw_only=True)
class Choice:
    """One answer to generate, what ran for it, and how many tokens its client got.

    The plans of `fallback` are tried in turn where the `plan` fails before its first token.
    """

    plan: Plan
    task: Task
    fallback: tuple[Plan, ...] = ()
    num_tokens: int = 0
    trace: Trace = field(default_factory=Trace)

    @property
    def prompt_tokens(self) -> int:
        """What who answers has read; until somebody has, what who was chosen will."""
        run = self.trace.accepted_run()
        return self.task.query.prompt_tokens if run is None else run.prompt_tokens


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a request is answered by from its beginning to its end, whatever is loaded meanwhile."""

    catalog: Catalog
    limits: ServingLimits


@dataclass(kw_only=True)
class Exchange:
    """A request while it is served: its record, filled in as facts become known, and what is not
    to be recorded.

    `started_s` and `ended_s` count seconds of `time.perf_counter`. `user` and the record's session
    come from headers until the body names them. `traceparent` is the W3C header of the trace that
    the client is in, whose `address` is not recorded. Nobody waits for one that is `offline`.
    `answer` gathers the first choice's text. At `deadline_s`, by the event loop's clock, the
    request is ended.
    """

    record: RequestRecord
    traceparent: str | None = None
    started_s: float = field(default_factory=time.perf_counter)
    deadline_s: float | None = None
    ended_s: float | None = None
    ask: Ask | None = None
    decisions: tuple[Decision, ...] = ()
    choices: tuple[Choice, ...] = ()
    key: Key | None = None
    reservation: Reservation | None = None
    user: str | None = None
    address: str = ""
    answer: list[str] = field(default_factory=list)
    recorded: bool = False
    terms: Terms | None = None
    offline: bool = False

    @classmethod
    def begin(
        cls, *, id_prefix: str, endpoint: str, headers: Mapping[str, str], address: str = ""
    ) -> Exchange:
        """Return the exchange of a request that has just arrived, from `address`."""
        unique = uuid.uuid4().hex
        asked = headers.get("x-request-id", "")
        record = RequestRecord(
            request_id=id_prefix + unique,
            client_request_id=asked if _SANE_ID.fullmatch(asked) else f"req_{unique}",
            endpoint=endpoint,
            time_s=time.time(),
            session=_name(headers, SESSION_HEADER),
        )
        return cls(
            record=record,
            traceparent=headers.get("traceparent"),
            user=_name(headers, USER_HEADER),
            address=address,
        )

    @property
    def catalog(self) -> Catalog:
        """What there was to ask for when the request came."""
        assert self.terms is not None
        return self.terms.catalog

    @property
    def limits(self) -> ServingLimits:
        """The bounds that held when the request came."""
        assert self.terms is not None
        return self.terms.limits

    @property
    def id(self) -> str:
        """The response's id."""
        return self.record.request_id

    @property
    def key_id(self) -> str | None:
        """The id of the key that the request brought, if it brought one."""
        return self.key.id if self.key else None

    @property
    def client_id(self) -> str:
        """Whose turn it is where clients take turns: the key's, else that of where it comes from.

        Its `user` shares it with others there. All that nobody waits for has one client's turn.
        """
        return "offline" if self.offline else self.key_id or self.address

    @property
    def elapsed_s(self) -> float:
        """The time since the request arrived; until it was over, if it is."""
        return (self.ended_s or time.perf_counter()) - self.started_s

    @property
    def prompt_tokens(self) -> int:
        """The length of all prompts, each once, as its first choice's answer read it."""
        return sum(choice.prompt_tokens for choice in self.choices[:: max(1, self.n)])

    @property
    def n(self) -> int:
        """How many choices each prompt has; they follow each other, all with the same plan."""
        return len(self.choices) // max(1, len(self.decisions))

    def member_tokens(self) -> dict[str, MemberTokens]:
        """Return what each member read and wrote for this request, accepted or not."""
        return tokens_of(run for choice in self.choices for run in choice.trace.leaves())

    def total(self, parts: Mapping[str, Footprint]) -> Footprint:
        """Return the sum of the members' footprints, its latency as measured so far."""
        return replace(Footprint.together(tuple(parts.values())), latency_s=self.elapsed_s)

    def member_footprints(self, rates: Mapping[str, Rates]) -> dict[str, Footprint]:
        """Return what each member has cost, measured where it could be."""
        costs: dict[str, list[Footprint]] = {}
        for choice in self.choices:
            for name, cost in choice.trace.member_footprints(rates):
                costs.setdefault(name, []).append(cost)
        return {name: Footprint.together(own) for name, own in costs.items()}

    def settled(self, rates: Mapping[str, Rates]) -> Iterator[tuple[Query, Decision, Footprint]]:
        """Yield each prompt's decision with what its choices have cost, and taken together.

        That is `Footprint()` where nothing ran.
        """
        for index, decision in enumerate(self.decisions):
            own = self.choices[index * self.n : (index + 1) * self.n]
            costs = [cost for choice in own for _, cost in choice.trace.member_footprints(rates)]
            total = Footprint.together(costs)
            if costs:
                total = replace(total, latency_s=self.elapsed_s)
            yield own[0].task.query, decision, total

    def stages(self) -> list[dict[str, Any]]:
        """Return everything that ran, in JSON; the choice's number where there are several."""
        if len(self.choices) == 1:
            return [run.to_json() for run in self.choices[0].trace.runs.values()]
        return [
            {"choice": index, **run.to_json()}
            for index, choice in enumerate(self.choices)
            for run in choice.trace.runs.values()
        ]

    def complete(
        self, rates: Mapping[str, Rates], *, keep_text: bool = False, user_secret: bytes = b""
    ) -> RequestRecord:
        """Fill in the rest of the record, now that the request is over, and return it.

        With the texts if they are to be kept. Users are hashed with the `user_secret`.
        """
        assert self.ended_s is not None
        record, answer = self.record, "".join(self.answer)
        parts = self.member_footprints(rates)
        record.latency_s = self.elapsed_s
        record.cost = self.total(parts).cost
        record.costs = {name: part.cost for name, part in parts.items()}
        record.members = self.member_tokens()
        record.answered_by = who_ran(record.members)
        record.num_choices = len(self.choices)
        record.prompt_tokens = self.prompt_tokens if self.choices else record.prompt_tokens
        record.stages = tuple(self.stages())
        began_s = [run.started_s for choice in self.choices for run in choice.trace.leaves()]
        record.queue_s = min(began_s) - self.started_s if began_s else None
        record.key_id = self.key_id
        record.team_id = self.key.team.id if self.key and self.key.team else None
        record.user_hash = _hash(self.user, user_secret) if self.user else None
        if self.ask is not None:
            record.model, record.stream = self.ask.model, self.ask.stream
        if self.decisions:
            record.plan = to_json(self.decisions[0].plan)
            record.scores = self.decisions[0].scores
            record.familiar = self.decisions[0].familiar
        if record.status < 400:
            record.answer_digest = answer_digest(self.id, answer)
        if keep_text:
            record.query_text = self.choices[0].task.query.text if self.choices else None
            record.answer_text = answer if self.answer else None
        return record


def shoal_field(
    exchange: Exchange, catalog: Catalog, answers: Sequence[Chunk] = ()
) -> dict[str, Any]:
    """Return the `shoal` object of an answered request.

    Where it is to explain itself and has whole `answers`, it says what scorers see of the first.

    `plan`, `reason`, `members` and `weights` are the first choice's; the members are those whose
    text it is. Tokens and cost are of everything that ran, stages that were not accepted included.
    """
    parts = exchange.member_footprints(catalog.prices.rates)
    cost = exchange.total(parts)
    [decision, *_] = exchange.decisions
    run = exchange.choices[0].trace.accepted_run()
    accepted = run.plan if run is not None and isinstance(run.plan, Answer) else None
    data: dict[str, Any] = {
        "policy": exchange.record.policy,
        "plan": to_json(decision.plan),
        "reason": decision.reason,
        "members": list(accepted.members) if accepted else [],
        "weights": _weights(accepted, run.weights) if run and accepted else [],
        "tokens": {
            name: {"prompt": tokens.prompt_tokens, "output": tokens.output_tokens}
            for name, tokens in exchange.member_tokens().items()
        },
        "cost": {"usd": cost.usd, "wh": cost.wh, "gco2e": cost.gco2e},
        "footprint": _footprint(catalog, cost, parts, exchange.record.output_tokens),
    }
    if exchange.record.arm is not None:
        data["experiment"] = exchange.record.experiment
        data["arm"] = exchange.record.arm
    if exchange.ask is not None and exchange.ask.extension.explain:
        data["scores"] = dict(decision.scores)
        data["details"] = dict(decision.details)
        data["stages"] = exchange.stages()
        seen = logprobs(answers[0].tokens) if answers else None
        data["logprobs"] = None if seen is None else asdict(seen)
    return data


def _footprint(
    catalog: Catalog, cost: Footprint, parts: Mapping[str, Footprint], output_tokens: int
) -> dict[str, Any]:
    """Return energy and carbon with the methods behind them, in total and by member."""
    grid = catalog.prices.grid_reading()
    return {
        **cost.to_json(),
        "joules_per_output_token": cost.wh * 3600 / output_tokens if output_tokens else None,
        "idle": catalog.prices.idle,
        "methods": explain_methods(part.method for part in parts.values()),
        "grid": {
            "gco2e_per_kwh": grid.gco2e_per_kwh,
            "source": grid.source,
            "factor": grid.factor,
        },
        "members": {
            name: {"engine": catalog.members.engine_of(name), **part.to_json()}
            for name, part in parts.items()
        },
    }


def _weights(answer: Answer, used: tuple[float, ...] | None) -> list[float]:
    """Return the members' weights, summing to one: those that were used, else the plan's."""
    weights = used or answer.weights or (1.0,) * len(answer.members)
    return [weight / sum(weights) for weight in weights]


def answer_digest(request_id: str, text: str) -> str:
    """Return 16 hexadecimal digits that stand for `text`, but for case, spacing and closing marks.

    So servers that keep no text can tell whether an answer equals a label. Keyed by the request, so
    that equal answers to different requests do not look equal. It is not a secret: who has the
    ledger can test guesses against it, and short answers are easily guessed.
    """
    key = hashlib.blake2b(request_id.encode(), digest_size=32).digest()
    return hashlib.blake2b(normalise(text).encode(), key=key, digest_size=8).hexdigest()


def _hash(user: str, secret: bytes) -> str:
    name = user.encode("utf-8", "replace")
    return hmac.new(secret, name, hashlib.sha256).hexdigest()[:16]


def _name(headers: Mapping[str, str], header: str) -> str | None:
    return headers.get(header, "")[:_MOST_CHARACTERS] or None
