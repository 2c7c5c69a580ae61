"""What OpenAI's endpoints answer, object by object, for the OpenAPI document.

Optional fields are left out where there is nothing to say; those that may be null are always there.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Field

from models.engines.base import FinishReason
from router.openapi import Listing

# Of the request's stop strings and tokens, the one that ended the answer, as vLLM tells it.
StopReason: TypeAlias = str | int | None


class Tokens(BaseModel):
    """What one member read and wrote."""

    prompt: int
    output: int


class Spent(BaseModel):
    """What an answer cost."""

    usd: float
    wh: float
    gco2e: float


class MemberFootprint(Spent):
    """What one member cost, how that is known, and between which figures the true ones lie."""

    engine: str | None = None
    usd_low: float
    usd_high: float
    wh_low: float
    wh_high: float
    gco2e_low: float
    gco2e_high: float
    method: str
    price: str
    latency_s: float
    embodied_gco2e: float
    flops: float
    busy_s: float
    idle_wh: float


class Grid(BaseModel):
    """The grid's carbon intensity, and by which factor the true one may be off."""

    gco2e_per_kwh: float
    source: str
    factor: float


class MethodFacts(BaseModel):
    """How far a method's figures may be off, as factors, where that is from and since when."""

    low: float
    high: float
    source: str
    date: str


class FootprintFacts(MemberFootprint):
    """Energy and carbon with the methods behind them, in total and by member."""

    joules_per_output_token: float | None
    idle: str
    methods: dict[str, MethodFacts]
    grid: Grid
    members: dict[str, MemberFootprint]


class AnswerFacts(BaseModel):
    """The `shoal` object of an answer; what stands last, only where `shoal.explain` asks for it."""

    policy: str | None
    plan: Any
    reason: str
    members: list[str]
    weights: list[float]
    tokens: dict[str, Tokens]
    cost: Spent
    footprint: FootprintFacts
    experiment: str | None = None
    arm: str | None = None
    scores: dict[str, float] | None = None
    details: dict[str, Any] | None = None
    stages: list[dict[str, Any]] | None = None
    logprobs: dict[str, float | None] | None = None


class PromptDetails(BaseModel):
    """Of the prompt's tokens."""

    cached_tokens: int


class OutputDetails(BaseModel):
    """Of the answer's tokens."""

    reasoning_tokens: int


class Usage(BaseModel):
    """How many tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: OutputDetails | None = None


class _Completion(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    shoal: AnswerFacts


class _Piece(_Completion):
    """A part of a stream: `usage` where it was asked for, in the last one not null."""

    usage: Usage | None = None
    shoal: AnswerFacts | None = None  # type: ignore[assignment]


class TokenLogprob(BaseModel):
    """One alternative at a position."""

    token: str
    logprob: float | None
    bytes: list[int]


class ChosenLogprob(TokenLogprob):
    """One token of an answer."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of an answer."""

    content: list[ChosenLogprob]
    refusal: None


class CalledFunction(BaseModel):
    """What is called; `arguments` is JSON text as the model wrote it."""

    name: str | None = None
    arguments: str


class FunctionCall(BaseModel):
    """A call that the model made; in a stream `index` says whose piece it is."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class ChatDelta(BaseModel):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[FunctionCall] | None = None


class ChatAnswer(ChatDelta):
    """A message; `reasoning` is what the model thought first."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: StopReason = None


class ChatCompletion(_Completion):
    """A chat completion."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(BaseModel):
    """What a chunk adds to one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: StopReason = None


class ChatCompletionChunk(_Piece):
    """A part of a streamed chat completion; `data: [DONE]` follows the last one."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class TextLogprobs(BaseModel):
    """The tokens of a text; a prompt's first has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One text."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: StopReason = None


class TextCompletion(_Completion):
    """A text completion."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage


class TextCompletionChunk(_Piece):
    """A part of a streamed text completion; `data: [DONE]` follows the last one."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class ContentPart(BaseModel):
    """A text, a refusal or a thought."""

    type: Literal["output_text", "refusal", "reasoning_text"]
    text: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class MessageItem(BaseModel):
    """A message as an item."""

    id: str
    type: Literal["message"]
    status: str
    role: Literal["assistant"]
    content: list[ContentPart]


class ReasoningItem(BaseModel):
    """What the model thought, as an item."""

    id: str
    type: Literal["reasoning"]
    status: str
    summary: list[Any]
    content: list[ContentPart]


class CallItem(BaseModel):
    """A call as an item."""

    id: str
    type: Literal["function_call"]
    status: str
    call_id: str
    name: str
    arguments: str


OutputItem = Annotated[MessageItem | ReasoningItem | CallItem, Field(discriminator="type")]


class ResponseError(BaseModel):
    """Why a response failed."""

    code: str | None
    message: str


class Incomplete(BaseModel):
    """Why a response is not whole."""

    reason: Literal["max_output_tokens", "content_filter"]


class ResponseUsage(BaseModel):
    """How many tokens."""

    input_tokens: int
    input_tokens_details: PromptDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class Response(BaseModel):
    """A response; what stands after `usage` repeats what was asked."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None
    incomplete_details: Incomplete | None
    model: str
    output: list[OutputItem]
    usage: ResponseUsage | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]
    user: str | None
    shoal: AnswerFacts | None = None


class ResponseEvent(BaseModel):
    """An event of a streamed response; its `type` says which of the other fields it has."""

    type: str = Field(pattern=r"^response\.")
    sequence_number: int
    response: Response | None = None
    output_index: int | None = None
    content_index: int | None = None
    item_id: str | None = None
    item: OutputItem | None = None
    part: ContentPart | None = None
    delta: str | None = None
    text: str | None = None
    refusal: str | None = None
    name: str | None = None
    arguments: str | None = None
    logprobs: list[Any] | None = None
    shoal: AnswerFacts | None = None


class TargetFacts(BaseModel):
    """A policy's members, or a model's facts."""

    kind: Literal["policy", "model", "encoder"]
    members: list[str] | None = None
    engine: str | None = None
    parameters: int | None = None
    context_tokens: int | None = None
    domains: list[str] | None = None
    description: str | None = None
    usd_per_million_input_tokens: float | None = None
    usd_per_million_output_tokens: float | None = None


class ModelEntry(BaseModel):
    """A name that `model` takes; of a model also its context, the `max_model_len`, and of an
    adapter its base, the `parent`, as vLLM tells.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None = None
    max_model_len: int | None = None
    shoal: TargetFacts


class ModelList(Listing):
    """All of them."""

    data: list[ModelEntry]
