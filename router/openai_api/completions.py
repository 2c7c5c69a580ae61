"""`/v1/completions`: the body it takes, the objects it answers with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_core import from_json

from models.engines.base import Chunk
from models.tokenizer import Tokenizer
from policies.kinds import MOST_COUNT
from router.errors import bad_request
from router.executor.task import Prompt
from router.openai_api.ask import Ask, Extension
from router.openai_api.endpoint import ByChunks, Head
from router.openai_api.fields import MAX_CHOICES, SharedFields, read_body
from router.openai_api.logprobs import text_logprobs

_DEFAULT_MAX_TOKENS = 16  # OpenAI's

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {"suffix": ("",)}


def _read_prompt(value: object) -> tuple[Prompt, ...]:
    """Read a string, a list of strings, a list of token ids, or a list of such lists."""
    if isinstance(value, str):
        return (Prompt(text=value),)
    if not isinstance(value, list) or not value:
        raise ValueError(
            "must be a string, a list of strings, or one or several lists of token ids"
        )
    if all(isinstance(item, str) for item in value):
        return tuple(Prompt(text=item) for item in value)
    if _is_token_ids(value):
        return (Prompt(token_ids=tuple(value)),)
    if all(isinstance(item, list) and item and _is_token_ids(item) for item in value):
        return tuple(Prompt(token_ids=tuple(item)) for item in value)
    raise ValueError("must be a string, a list of strings, or one or several lists of token ids")


def _is_token_ids(value: list[Any]) -> bool:
    return all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i <= MOST_COUNT for i in value
    )


class CompletionFields(SharedFields):
    """The body of a text completion."""

    prompt: Annotated[Any, BeforeValidator(_read_prompt)]
    best_of: int | None = Field(None, ge=1, le=20)
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=5)


class CompletionEndpoint(ByChunks):
    """Reads and writes text completions. The tokenizer turns echoed token ids into text."""

    path = "/v1/completions"
    id_prefix = "cmpl-"
    schema: type[BaseModel] = CompletionFields

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def parse(self, body: bytes) -> Ask:
        """Return what `body` asks for; raises `ApiError`."""
        fields = read_body(CompletionFields, body, _UNSUPPORTED)
        n = fields.n or 1
        if fields.best_of is not None and fields.best_of != n:
            raise bad_request(
                "best_of is only supported where it equals n", "best_of", "unsupported_parameter"
            )
        if fields.echo and fields.logprobs is not None:
            raise bad_request(
                "echo with logprobs is not supported: the prompt's log-probabilities are not kept",
                "echo",
                "unsupported_parameter",
            )
        if len(fields.prompt) * n > MAX_CHOICES:
            raise bad_request(
                f"prompt and n ask for {len(fields.prompt) * n} choices; "
                f"at most {MAX_CHOICES} are allowed",
                "prompt",
            )
        return Ask(
            model=fields.model,
            prompts=fields.prompt,
            n=n,
            max_tokens=fields.max_tokens or _DEFAULT_MAX_TOKENS,
            sampling=fields.sampling(top_logprobs=fields.logprobs),
            stream=bool(fields.stream),
            include_usage=fields.include_usage(),
            logprobs=fields.logprobs is not None,
            echo=bool(fields.echo),
            user=fields.user,
            sent=from_json(body),
            extension=fields.shoal or Extension(),
        )

    def response(self, head: Head, ask: Ask, choices: list[Chunk]) -> dict[str, Any]:
        """Return the whole response but for usage."""
        return {
            **head.fields("text_completion"),
            "choices": [
                {
                    "index": index,
                    "text": self._echo(ask, index) + choice.text,
                    "logprobs": text_logprobs(choice.tokens, 0) if ask.logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
        }

    def stream_start(self, head: Head, ask: Ask) -> Iterator[dict[str, Any]]:
        """Yield the prompts, if they are to be echoed."""
        for index in range(ask.num_choices if ask.echo else 0):
            yield self._chunk(head, index, self._echo(ask, index), None, None)

    def stream_chunk(
        self, head: Head, ask: Ask, index: int, chunk: Chunk, offset: int
    ) -> Iterator[dict[str, Any]]:
        """Yield `chunk` of choice `index`; text offsets count from the answer's start."""
        if chunk.text or chunk.finish_reason or (ask.logprobs and chunk.tokens):
            logprobs = text_logprobs(chunk.tokens, offset) if ask.logprobs else None
            yield self._chunk(head, index, chunk.text, logprobs, chunk.finish_reason)

    def stream_end(self, head: Head) -> dict[str, Any]:
        """Return the chunk that carries the usage."""
        return {**head.fields("text_completion"), "choices": []}

    def _echo(self, ask: Ask, index: int) -> str:
        return ask.prompts[index // ask.n].text(self._tokenizer) if ask.echo else ""

    def _chunk(
        self,
        head: Head,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None,
        finish_reason: str | None,
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return {**head.fields("text_completion"), "choices": [choice]}
