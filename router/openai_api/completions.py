"""`/v1/completions`: the body it takes, the objects it answers with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from models.engines.base import Chunk
from models.tokenizer import Tokenizer
from policies.kinds import MOST_COUNT
from router.errors import bad_request
from router.executor.task import Prompt
from router.openai_api.endpoint import Ask, ChunkWriter, Head, ResponseWriter, Shapes, WireFormat
from router.openai_api.fields import (
    MAX_CHOICES,
    SharedFields,
    are_token_ids,
    read_fields,
    read_json,
)
from router.openai_api.logprobs import Offsets, text_logprobs
from router.openai_api.shapes import TextCompletion, TextCompletionChunk
from router.openapi import ErrorBody
from router.turns import one_by_one

_DEFAULT_MAX_TOKENS = 16  # OpenAI's

REFUSED: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "prompt_embeds": (),
    "suffix": ("",),
}


def _read_prompt(value: object) -> tuple[Prompt, ...]:
    """Read a string, a list of strings, a list of token ids, or a list of such lists."""
    if isinstance(value, str):
        return (Prompt(text=value),)
    if not isinstance(value, list) or not value:
        raise ValueError(
            "must be a string, a list of strings, or one or several lists of token ids"
        )
    if are_token_ids(value):
        return (Prompt(token_ids=tuple(value)),)
    if len(value) > MAX_CHOICES:
        raise ValueError(f"at most {MAX_CHOICES} prompts are allowed; a token id is below 2**31")
    if all(isinstance(item, str) for item in value):
        return tuple(Prompt(text=item) for item in value)
    if all(isinstance(item, list) and item and are_token_ids(item) for item in value):
        return tuple(Prompt(token_ids=tuple(item)) for item in value)
    raise ValueError(
        "must be a string, a list of strings, or one or several lists of token ids below 2**31"
    )


class CompletionFields(SharedFields):
    """The body of a text completion."""

    prompt: Annotated[Any, BeforeValidator(_read_prompt)]
    best_of: int | None = Field(None, ge=1, le=20)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    max_tokens: int | None = Field(None, ge=0, le=MOST_COUNT)


class CompletionEndpoint(WireFormat):
    """Reads and writes text completions. Token ids are echoed as the text that they are to a model:
    `tokenizer_for` returns the tokenizer of a served name.
    """

    path = "/v1/completions"
    id_prefix = "cmpl-"
    shapes = Shapes(
        takes=CompletionFields,
        answers=TextCompletion,
        streams=(TextCompletionChunk, ErrorBody),
    )

    def __init__(self, tokenizer_for: Callable[[str], Tokenizer]) -> None:
        self._tokenizer_for = tokenizer_for

    def parse(self, body: bytes) -> Ask:
        """Return what `body` asks for; raises `ApiError`."""
        sent = read_json(body)
        fields = read_fields(CompletionFields, sent, REFUSED)
        n = fields.n or 1
        if fields.best_of is not None and fields.best_of != n:
            raise bad_request(
                "best_of is only supported where it equals n", "best_of", "unsupported_parameter"
            )
        max_tokens = _DEFAULT_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
        if max_tokens == 0 and not fields.echo:
            raise bad_request("max_tokens: 0 needs echo: true", "max_tokens")
        fields.check_min_tokens(max_tokens)
        if len(fields.prompt) * n > MAX_CHOICES:
            raise bad_request(
                f"prompt and n ask for {len(fields.prompt) * n} choices; "
                f"at most {MAX_CHOICES} are allowed",
                "prompt",
            )
        sampling = fields.sampling(top_logprobs=fields.logprobs)
        if fields.echo:
            sampling = replace(sampling, prompt_logprobs=fields.logprobs)
        keep = fields.truncate_prompt_tokens
        return Ask(
            model=fields.model,
            prompts=tuple(prompt.shortened(keep) for prompt in fields.prompt),
            n=n,
            max_tokens=max_tokens,
            sampling=sampling,
            stream=bool(fields.stream),
            include_usage=fields.include_usage(),
            continuous_usage=fields.continuous_usage(),
            logprobs=fields.logprobs is not None,
            echo=bool(fields.echo),
            user=fields.user or fields.safety_identifier,
            sent=sent,
            extension=fields.extension(),
        )

    async def writer(self, head: Head, ask: Ask) -> ResponseWriter:
        """Return what writes the completion."""
        tokenizer = self._tokenizer_for(ask.model)
        echoed = one_by_one(ask.prompts if ask.echo else ())
        prompts = [await prompt.text(tokenizer) async for prompt in echoed]
        return TextWriter(head=head, ask=ask, prompts=prompts)


@dataclass(kw_only=True)
class TextWriter(ChunkWriter):
    """Writes a text completion, after the text of its prompt where `prompts` are to be echoed."""

    kind = chunk_kind = "text_completion"

    prompts: Sequence[str]
    _offsets: dict[int, Offsets] = field(default_factory=lambda: defaultdict(Offsets))

    def choice(self, index: int, choice: Chunk) -> dict[str, Any]:
        """Return a text, and its tokens where they were asked for."""
        return {
            "text": self._echo(index) + choice.text,
            "logprobs": self._logprobs(index, choice),
        }

    def start(self) -> list[dict[str, Any]]:
        """Return the prompts, if they are to be echoed."""
        choices = range(self.ask.num_choices if self.ask.echo else 0)
        return [self.piece(index, {"text": self._echo(index)}) for index in choices]

    def chunk(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:
        """Return what `chunk` becomes; text offsets count from the start of what is shown."""
        told = self.ask.logprobs and (chunk.tokens or chunk.prompt)
        if not (chunk.text or chunk.finish_reason or told):
            return []
        return [self.piece(index, {"text": chunk.text}, self._logprobs(index, chunk), chunk)]

    def _echo(self, index: int) -> str:
        return self.prompts[index // self.ask.n] if self.ask.echo else ""

    def _logprobs(self, index: int, chunk: Chunk) -> dict[str, Any] | None:
        if not self.ask.logprobs:
            return None
        prompt = chunk.prompt if self.ask.echo else None
        return text_logprobs(chunk.tokens, self._offsets[index], prompt)
