"""The contract of every engine: token streams from one or several members of a pool.

An engine runs in one process, holds one or more models ("members") that share a tokenizer, and
answers `GenerationRequest`s as streams of `Chunk`s. It knows nothing of HTTP, policies or plans:
the executor turns a plan's `Answer` into one request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from models.adapter import AdapterSource
from models.answer_format import ToolCall, Tools
from models.chat_template import Message, Rendering

FinishReason: TypeAlias = Literal["stop", "length", "content_filter", "tool_calls"]
FusionRule: TypeAlias = Literal["mixture", "product", "gated", "contrastive"]
Circuit: TypeAlias = Literal["closed", "half-open", "open"]
Encodes: TypeAlias = Literal["vector", "score"]
StructureKind: TypeAlias = Literal["json", "regex", "choice", "grammar"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """What an answer is held to, by `kind`: the JSON text of a schema ("{}": any value), a regular
    expression, the JSON text of a list of strings, or a grammar in Lark's or llama.cpp's notation.

    What a schema says beyond what a grammar can hold is an error only where it is `strict`. `name`
    is the client's, for a server that is asked on, and `field` the one in which it was asked for.
    """

    kind: StructureKind
    text: str
    strict: bool = False
    name: str | None = None
    field: str = "response_format"


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How tokens are drawn; the names and ranges are the OpenAI API's (vLLM's for the rest).

    `temperature` 0 is greedy. `top_k` and `min_p` None mean off. `seed` None draws fresh
    randomness; with a seed, the same request gives the same tokens whatever else is in the batch.
    `logit_bias` maps token ids to [-100, 100]. `repetition_penalty` makes tokens
    less likely that prompt or answer have (CTRL, Keskar et al. 2019: positive logits are divided by
    it, negative ones multiplied; where members are fused there are log-probabilities only); 1 is
    off. `top_logprobs` None returns no alternatives, 0-20 that many; `prompt_logprobs` the same for
    the prompt's own tokens. No end is drawn before `min_tokens`; `stop_token_ids` end an answer
    beside the model's own ends. With `include_stop` the stop string stays in the text.
    `ignore_eos` goes on to `max_tokens` (benchmarks). Without `logprobs` nobody reads what an
    answer's tokens are and how likely: an engine may leave out ids and log-probabilities.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    structure: Structure | None = None
    ignore_eos: bool = False
    logprobs: bool = True


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Weights that the members' own predictions set: w_m ∝ prior_m · exp(l_m / temperature).

    l_m is the log-likelihood of the prompt's tokens under member m, in nats: their sum, or with
    `per_token` their mean (PackLLM, Mavromatis et al. 2024). With `update`, the answer's tokens
    count like the prompt's as they come.
    """

    temperature: float = 1.0
    per_token: bool = False
    update: bool = False


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What is asked of an encoder in place of an answer: a vector of length one for each of the
    `inputs` (texts, or token ids as they are), or how well each of them, texts then, answers the
    `query`. With `cut`, what is longer than the model's context is cut to it.
    """

    inputs: tuple[str | tuple[int, ...], ...]
    query: str | None = None
    cut: bool = False

    @property
    def kind(self) -> Encodes:
        """What an encoder must be able to tell."""
        return "vector" if self.query is None else "score"

    @property
    def texts(self) -> tuple[str, ...]:
        """All texts that are read, the query first."""
        query = () if self.query is None else (self.query,)
        return (*query, *(text for text in self.inputs if isinstance(text, str)))


Party: TypeAlias = tuple[str, ...]
"""A client, or a client and one of its users."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One answer to generate: `members` fused by `rule` with relative `weights` (None: uniform).

    The first member leads where the rule knows one: `gate` is the probability of its likeliest
    token from which on "gated" takes it alone; "contrastive" raises the second last member over
    the last by the power `contrast` (see `policies.plan.Answer`) and takes no weights. With
    `evidence`, the weights are only the prior.

    `prompt_tokens` is the whole templated prompt in the engine's tokenizer; `messages` or `text` is
    what it was made of, for engines that ask another server, and neither where the client sent
    token ids; `rendering` is how a conversation was made a prompt, None for what was none. `sent`
    is the client's own body, where another server gets it as it came. `tools` are offered only to
    engines whose traits allow them. `request_id` is unique; cancellation and logs use it.
    `client_id` groups requests for fair queueing, in which a client of twice the `client_weight`
    gets twice as much, and `user`, by any name, shares what its client gets with that client's
    other users. After `timeout_s` nobody waits for the answer any
    more (None: not known). Those that are `offline` get their turn when no others wait. With an
    `encoding` it is one of an encoder, and has no prompt. `adapters` are those of the members that
    are adapters, by name: an engine loads one that it has not when a request first needs it, so
    that every replica follows.
    """

    request_id: str
    prompt_tokens: tuple[int, ...]
    members: tuple[str, ...]
    weights: tuple[float, ...] | None = None
    rule: FusionRule = "mixture"
    gate: float = 0.9
    contrast: float = 0.5
    evidence: Evidence | None = None
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    client_id: str = ""
    client_weight: float = 1.0
    user: str = ""
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    sent: Mapping[str, Any] | None = None
    rendering: Rendering | None = None
    tools: Tools | None = None
    timeout_s: float | None = None
    offline: bool = False
    encoding: Encoding | None = None
    adapters: Mapping[str, AdapterSource] = field(default_factory=dict)

    @cached_property
    def parties(self) -> tuple[Party, Party]:
        """Who takes turns: the client with others, and its user with the client's others."""
        return (self.client_id,), (self.client_id, self.user)


@dataclass(frozen=True, kw_only=True, slots=True)
class TopLogprob:
    """One alternative at a position: id, bytes, natural log-probability."""

    token_id: int
    raw: bytes
    logprob: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Token:
    """One generated token; `logprob` is under the fused distribution before sampling filters.

    That is log-softmax of the (fused) logits, before temperature, penalties, bias and truncation;
    None where the model is elsewhere and its server doesn't say (and there `token_id` is 0). `top`
    is best first. `entropy` is the whole distribution's, in nats; None where the engine cannot see
    it. A `thought` belongs to the reasoning before the answer, not to the answer's text.
    """

    token_id: int
    raw: bytes
    logprob: float | None
    top: tuple[TopLogprob, ...] = ()
    entropy: float | None = None
    thought: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A piece of the answer. `text` may lag behind `tokens` while a stop string or a character may
    still be incomplete; the texts of all chunks joined are the answer, without the stop string.
    `tokens` holds every generated token, the end-of-sequence token included in the count but with
    no bytes. What the model thought before it answered is `reasoning`, why it would not is the
    `refusal`; neither is in the text. `tool_calls` are calls, or pieces of them. The last chunk,
    and only it, has a `finish_reason`, the request's stop string or token that ended the answer, if
    one did (`stop`), and where several members were fused the `weights` that they
    had in the end, in the request's order. Where another server counted, it says how many tokens
    prompt and answer had, whatever was shown of them; and where the engine knows, how many of the
    prompt's were kept from earlier ones, and how many of the answer's were reasoning. Where a lead
    wrote alone until it was unsure, `followed` is how many tokens the others read and wrote. The
    first chunk has the tokens of the `prompt` with their log-probabilities, where these were asked
    for; the first of them has none, and `rows` are then what each member's last layer made of the
    prompt's end, where the engine can see it. An encoder's only chunk has `rows`, one per input:
    vectors [num_inputs, num_dimensions], or scores [num_inputs, 1].
    """

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    weights: tuple[float, ...] | None = None
    reasoning: str = ""
    refusal: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    followed: tuple[int, int] | None = None
    prompt: tuple[Token, ...] = ()
    rows: NDArray[np.float32] | None = None


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """A snapshot for metrics and autoscaling.

    `circuit` is the state of the breaker of an engine that asks another server: "open" while that
    server is left alone because it failed, "half-open" while one request tries it. `idle_wh` is the
    energy drawn while no request ran; engines leave it to whoever meters them. `restarts_total`
    counts how often a failed engine was started again. Of the `gated_tokens_total` that a lead
    generated who runs alone where it is sure, `fused_tokens_total` took the others as well; of the
    `drafted_tokens_total` that were guessed, `accepted_tokens_total` were right.
    """

    running_requests: int = 0
    queued_requests: int = 0
    active_lanes: int = 0
    kv_bytes_used: int = 0
    kv_bytes_total: int = 0
    generated_tokens_total: int = 0
    gated_tokens_total: int = 0
    fused_tokens_total: int = 0
    drafted_tokens_total: int = 0
    accepted_tokens_total: int = 0
    busy_seconds_total: float = 0.0
    restarts_total: int = 0
    idle_wh: float = 0.0
    circuit: Circuit | None = None

    @classmethod
    def total(cls, snapshots: Sequence[EngineStats]) -> EngineStats:
        """Return the sum over replicas, and the worst of their circuits."""
        numbers = {
            field.name: sum(getattr(snapshot, field.name) for snapshot in snapshots)
            for field in fields(cls)
            if field.name != "circuit"
        }
        states = {snapshot.circuit for snapshot in snapshots}
        worst = next((state for state in _WORST_FIRST if state in states), None)
        return cls(**numbers, circuit=worst)


_WORST_FIRST: tuple[Circuit, ...] = ("open", "half-open", "closed")


@runtime_checkable
class HasMetrics(Protocol):
    """An engine whose library counts things of its own."""

    def metrics(self) -> str:
        """Return them in Prometheus' text format."""
        ...


class Engine(Protocol):
    """Generates. One instance per process; all methods are called on one event loop."""

    @property
    def members(self) -> tuple[str, ...]:
        """The models this engine holds, in the pool's order."""
        ...

    async def start(self) -> None:
        """Load weights and warm up. Raises `PoolError` or `EngineFailed`."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk]:
        """Stream the answer to `request`.

        Closing the iterator early (`aclose`, or cancelling the task that reads it) cancels the
        request and frees what it held within one step. Raises, on the first `__anext__` where
        that can be known: `RequestError`, `ContextOverflow`, `EngineOverloaded`; at any point
        `EngineFailed`.
        """
        ...

    def stats(self) -> EngineStats:
        """Return a snapshot; cheap."""
        ...

    def check_health(self) -> None:
        """Raise `EngineFailed` if the engine cannot serve any more."""
        ...

    async def stop(self) -> None:
        """Cancel what runs and free everything; idempotent."""
        ...


def of_length_one(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Return an encoder's vectors, a row each, scaled to length one; zeros stay zeros."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(norms, 1e-12), np.float32)
