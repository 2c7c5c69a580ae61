"""What a plan is run on: one choice of one request, and its prompt, tokenized at most once each."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.chat_template import Message
from models.engines.base import SamplingOptions
from models.tokenizer import Tokenizer
from models.tools import Tools
from policies.base import Query

# Below this, tokenizing takes less time than handing it to a thread is worth.
_INLINE_CHARACTERS = 16_384


class Prompt:
    """A conversation, a text, or token ids as they are; give exactly one.

    `query` is what a policy reads: the last user message, or the text. With a conversation come the
    `tools` that it offers, if any.
    """

    def __init__(
        self,
        *,
        messages: Sequence[Message] | None = None,
        text: str | None = None,
        token_ids: tuple[int, ...] | None = None,
        tools: Tools | None = None,
    ) -> None:
        assert sum(part is not None for part in (messages, text, token_ids)) == 1
        self._messages = messages
        self._text = text
        self._token_ids = token_ids
        self.tools = tools
        self._cache: dict[int, tuple[int, ...]] = {}

    @property
    def messages(self) -> Sequence[Message] | None:
        """The conversation, if it is one."""
        return self._messages

    @property
    def plain_text(self) -> str | None:
        """The text, if it was given as one."""
        return self._text

    def query(self, tokenizer: Tokenizer) -> str:
        """Return what a policy reads; `tokenizer` serves to read token ids."""
        if self._messages is not None:
            asked = [m["content"] for m in self._messages if m["role"] == "user"]
            return str(asked[-1] if asked else self._messages[-1]["content"])
        return self.text(tokenizer)

    def text(self, tokenizer: Tokenizer) -> str:
        """Return the text of a prompt that is no conversation."""
        assert self._messages is None
        return self._text if self._text is not None else tokenizer.decode(self._token_ids or ())

    async def tokens(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return the prompt's ids. Long prompts are tokenized in a thread.

        Raises `RequestError` if the chat template refuses the conversation.
        """
        if self._token_ids is not None:
            return self._token_ids
        key = id(tokenizer)
        if key not in self._cache:
            if self._num_characters() > _INLINE_CHARACTERS:
                self._cache[key] = await asyncio.to_thread(self._encode, tokenizer)
            else:
                self._cache[key] = self._encode(tokenizer)
        return self._cache[key]

    def _encode(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        if self._messages is not None:
            tools = self.tools.functions if self.tools else ()
            return tokenizer.encode_chat(self._messages, tools)
        return tokenizer.encode(self._text or "")

    def _num_characters(self) -> int:
        if self._messages is not None:
            return sum(len(message["content"]) for message in self._messages)
        return len(self._text or "")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One choice to generate.

    `request_id` is unique per choice. `max_tokens` None means as many as the context and the
    serving limits allow. With `stream`, chunks come as they are generated; without, an engine is
    called once per answer, which is cheaper. `sent` is the client's body as it came. With
    `ceiling`, an answer may be shorter than `max_tokens` where the context ends. At `deadline_s`,
    by the event loop's clock, nobody waits for the answer any more (None: not known).
    """

    request_id: str
    query: Query
    prompt: Prompt
    sampling: SamplingOptions
    max_tokens: int | None
    stream: bool
    client_id: str = ""
    sent: Mapping[str, Any] | None = None
    ceiling: bool = False
    deadline_s: float | None = None
