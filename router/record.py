"""What is known of one request after it ended: the row behind ledger, metrics and experiments.

One `RequestRecord` per HTTP request that asked for an answer, whatever became of it: answered,
streamed, refused, failed or left by its client. Text is in it only where the ledger is told to
keep text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class MemberTokens:
    """Tokens that one member read and wrote, summed over everything the plan ran."""

    prompt_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class MemberCost:
    """What one member cost, summed likewise; `method` says how its energy is known."""

    usd: float = 0.0
    wh: float = 0.0
    gco2e: float = 0.0
    method: str = ""


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """One request.

    `request_id` is unique (the primary key) and the `id` of the response's body;
    `client_request_id` is the `x-request-id` header, which clients may repeat. `time_s` is the Unix
    time at which it arrived. `model` is what the client asked for, `policy` what decided (None
    where a model or a plan was named), `plan` its JSON (None if refused before a plan was made).
    `prompt_tokens` and `output_tokens` are the client's usage, `members` and `costs` everything
    that ran for it, stages that were not accepted included. `energy_method` says how `wh` and
    `gco2e` are known (`Footprint.method`; None where nothing ran). `status` is the HTTP status, 499
    where the client left; `error` the error's code. `ttft_s` is the time to the first text (None if
    there was none). `user_hash` is SHA-256 of the body's `user`, cut to 16 hexadecimal digits.
    `scores` are the policy's predictions, `stages` what ran, in order: plan path, members, score,
    tokens, seconds, outcome. `experiment` and `arm` are where the request took part, `unit` the
    hash of the randomised unit and `propensity` the probability with which it got this arm; None
    outside of experiments. `expected_quality` is the default policy's prediction, whichever policy
    decided: a covariate. `answer_digest` tells whether a label equals the answer (`router.digest`).
    `query_text` (the last user message) and `answer_text` are None unless `ledger.keep_text`.
    """

    request_id: str
    time_s: float
    endpoint: str
    model: str
    status: int
    latency_s: float
    client_request_id: str = ""
    stream: bool = False
    ttft_s: float | None = None
    error: str | None = None
    policy: str | None = None
    plan: Mapping[str, Any] | None = None
    prompt_tokens: int = 0
    output_tokens: int = 0
    num_choices: int = 0
    members: Mapping[str, MemberTokens] = field(default_factory=dict)
    costs: Mapping[str, MemberCost] = field(default_factory=dict)
    usd: float = 0.0
    wh: float = 0.0
    gco2e: float = 0.0
    energy_method: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    stages: tuple[Mapping[str, Any], ...] = ()
    user_hash: str | None = None
    session: str | None = None
    key_id: str | None = None
    experiment: str | None = None
    arm: str | None = None
    unit: str | None = None
    propensity: float | None = None
    expected_quality: float | None = None
    answer_digest: str | None = None
    query_text: str | None = None
    answer_text: str | None = None

    def ran(self) -> tuple[str, ...]:
        """Return the members that read or wrote anything for this request, sorted by name."""
        used = (name for name, m in self.members.items() if m.prompt_tokens or m.output_tokens)
        return tuple(sorted(used))

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON data."""
        return asdict(self)
