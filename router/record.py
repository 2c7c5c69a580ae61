"""What is known of one request: the one place that names what ledger, log and traces say of it.

One `RequestRecord` per HTTP request that asked for an answer, whatever became of it: answered,
streamed, refused, failed or left by its client. Every field is a column of the table `requests`,
made from its annotation, and so stands in each export; `shown` puts it into the log's line and the
trace's span too. Text is in it only where the ledger is told to keep text.

A new fact is a field here, a line where it is known (mostly `router.exchange`), and, once there
are released databases, a step in `router.ledger.schema`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from policies.footprint import AMOUNTS, Cost

SHADOW = "shadow"  # the endpoint of what another policy answered unseen
CLIENT_CLOSED_REQUEST = 499  # nginx's status of a client that left, which it never sees

# A client may ask for a model by any name, however long. Nothing but kept texts is longer.
MOST_CHARACTERS = 200
TEXTS = ("query_text", "answer_text")


def mirrored_request_id(shadow: str, request_id: str) -> str:
    """Return the id of the row that `shadow` leaves for `request_id`."""
    return f"{shadow}/{request_id}"


def shown(*, log: bool = True, span: str | None = None) -> dict[str, Any]:
    """Return a field's metadata: whether the log's line has it, and its name in the span."""
    return {"log": log, "span": span}


@dataclass(frozen=True, kw_only=True)
class MemberTokens:
    """Tokens that one member read and wrote, summed over everything the plan ran."""

    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(kw_only=True)
class RequestRecord:
    """One request. `Exchange` fills it in while it is served; then it does not change any more.

    `request_id` is unique (the primary key) and the `id` of the response's body;
    `client_request_id` is the `x-request-id` header, which clients may repeat. `time_s` is the Unix
    time at which it arrived. `model` is what the client asked for, `policy` what decided (None
    where a model or a plan was named), `plan` its JSON (None if refused before a plan was made).
    `answered_by` are the members that read or wrote anything, sorted, joined by "+" (None: nobody).
    `prompt_tokens` and `output_tokens` are the client's usage; `cached_tokens` of the prompt,
    summed over choices, had been read before, and `reasoning_tokens` of the output came before the
    answers (None where no engine says). `members` and `costs` are
    everything that ran for it, stages that were not accepted included. `energy_method` says how
    `wh` and `gco2e` are known (`Cost.method`; None where nothing ran), `price` how `usd` is;
    `_low`, `_high`, `busy_s` and `idle_wh` are as in `Cost`. `status` is the HTTP status,
    499 where the client left; `error` the error's code. `queue_s` is the time until the first
    engine was asked: for the key, the plan, and room in the budgets (None: none was). `ttft_s` is
    the time to the first text (None if there was none). `team_id` is the team that the key
    belonged to then, `edition` counts what the server has loaded (`router.editions`). `user_hash`
    stands for the body's
    `user`: HMAC-SHA-256 with the installation's secret, cut to 16 hexadecimal digits. `scores` are
    the policy's predictions, `familiar` says whether the query is like those that it learned from
    (None: it cannot tell), `conversation` names what the next turn begins with, and `answered_with`
    is the JSON of the `Answer` that the client got (`router.conversations`); `stages` what ran,
    in order: plan path, members, score, tokens, seconds, outcome. `experiment` and `arm` are where
    the request took part, `unit` the hash of the randomised unit and `propensity` the probability
    with which it got this arm; None outside of experiments. `expected_quality` is the default
    policy's prediction, whichever policy decided: a covariate. `language` is the query's (ISO
    639-1), where an experiment compares languages. `answer_digest` tells whether a label equals the
    answer. `query_text` (the last user message) and `answer_text` are None unless
    `ledger.keep_text`.
    """

    request_id: str = field(metadata=shown(span="gen_ai.response.id"))
    time_s: float
    endpoint: str = field(metadata=shown())
    model: str = field(default="", metadata=shown(span="gen_ai.request.model"))
    policy: str | None = field(default=None, metadata=shown(span="shoal.policy"))
    answered_by: str | None = field(default=None, metadata=shown(span="gen_ai.response.model"))
    status: int = field(
        default=CLIENT_CLOSED_REQUEST, metadata=shown(span="http.response.status_code")
    )
    error: str | None = field(default=None, metadata=shown(span="error.type"))
    stream: bool = field(default=False, metadata=shown(log=False, span="gen_ai.request.stream"))
    latency_s: float = field(default=0.0, metadata=shown())
    queue_s: float | None = field(default=None, metadata=shown(span="shoal.queue_s"))
    ttft_s: float | None = field(
        default=None, metadata=shown(span="gen_ai.response.time_to_first_chunk")
    )
    prompt_tokens: int = field(default=0, metadata=shown(span="gen_ai.usage.input_tokens"))
    output_tokens: int = field(default=0, metadata=shown(span="gen_ai.usage.output_tokens"))
    cached_tokens: int | None = field(
        default=None, metadata=shown(span="gen_ai.usage.cache_read.input_tokens")
    )
    reasoning_tokens: int | None = None
    num_choices: int = 0
    usd: float = field(default=0.0, metadata=shown(span="shoal.cost.usd"))
    usd_low: float = 0.0
    usd_high: float = 0.0
    wh: float = field(default=0.0, metadata=shown(span="shoal.energy.wh"))
    wh_low: float = 0.0
    wh_high: float = 0.0
    gco2e: float = field(default=0.0, metadata=shown(span="shoal.carbon.gco2e"))
    gco2e_low: float = 0.0
    gco2e_high: float = 0.0
    busy_s: float = 0.0
    idle_wh: float = 0.0
    energy_method: str | None = None
    price: str | None = None
    key_id: str | None = field(default=None, metadata=shown())
    team_id: str | None = None
    edition: int = 1
    user_hash: str | None = None
    session: str | None = field(
        default=None, metadata=shown(log=False, span="gen_ai.conversation.id")
    )
    experiment: str | None = None
    arm: str | None = field(default=None, metadata=shown(span="shoal.arm"))
    unit: str | None = None
    propensity: float | None = None
    expected_quality: float | None = None
    language: str | None = None
    client_request_id: str = field(default="", metadata=shown())
    plan: Mapping[str, Any] | None = None
    members: Mapping[str, MemberTokens] = field(default_factory=dict)
    costs: Mapping[str, Cost] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    familiar: bool | None = field(default=None, metadata=shown(span="shoal.familiar"))
    conversation: str | None = None
    answered_with: Mapping[str, Any] | None = None
    stages: tuple[Mapping[str, Any], ...] = ()
    answer_digest: str | None = None
    query_text: str | None = None
    answer_text: str | None = None

    @property
    def cost(self) -> Cost:
        """What the request cost in all."""
        amounts = {name: getattr(self, name) for name in AMOUNTS}
        return Cost(**amounts, method=self.energy_method or "", price=self.price or "")

    @cost.setter
    def cost(self, cost: Cost) -> None:
        for name in AMOUNTS:
            setattr(self, name, getattr(cost, name))
        self.energy_method, self.price = cost.method or None, cost.price or None

    @property
    def is_refusal(self) -> bool:
        """Whether nothing ran for it, and no experiment counts it: such can be sent without end."""
        refused = 400 <= self.status < CLIENT_CLOSED_REQUEST or self.status == 503
        return refused and self.answered_by is None and self.arm is None

    def log_fields(self) -> dict[str, Any]:
        """Return what the log's line says; times in microseconds' precision, `members` a list."""
        line = {name: _short(self._shown(name)) for name in _LOGGED}
        del line["answered_by"]
        line["members"] = self.answered_by.split("+") if self.answered_by else []
        return line

    def span_attributes(self) -> dict[str, Any]:
        """Return what the trace's span says; what is not known is left out."""
        found = {span: self._shown(name) for name, span in _TRACED.items()}
        if not self.stream:
            del found["gen_ai.response.time_to_first_chunk"]
        return {name: value for name, value in found.items() if value not in (None, "")}

    def _shown(self, name: str) -> Any:  # noqa: ANN401 - any field
        """Return a field as people read it: an arm with its experiment."""
        value = getattr(self, name)
        return f"{self.experiment}/{value}" if name == "arm" and value is not None else value


_LOGGED = tuple(f.name for f in fields(RequestRecord) if f.metadata.get("log"))
_TRACED = {f.name: f.metadata["span"] for f in fields(RequestRecord) if f.metadata.get("span")}


def who_ran(members: Mapping[str, MemberTokens]) -> str | None:
    """Return the `answered_by` of a request for which `members` worked."""
    ran = [name for name, m in members.items() if m.prompt_tokens or m.output_tokens]
    return "+".join(sorted(ran)) or None


def _short(value: object) -> object:
    if isinstance(value, str):
        return value[:MOST_CHARACTERS]
    return round(value, 6) if isinstance(value, float) else value
