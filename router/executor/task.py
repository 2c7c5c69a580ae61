"""What a plan is run on: one choice of one request, its prompt, tokenized at most once for each
tokenizer, and what an engine gets of both."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

from models.answer_format import Tools
from models.chat_template import Message, Rendering
from models.engines.base import Encoding, GenerationRequest, SamplingOptions
from models.engines.requests import fusion_of
from models.errors import ContextOverflow, RequestError
from models.tokenizer import RoughTokenizer, Tokenizer
from policies.base import Query
from policies.plan import Answer
from router.catalog.members import Members

# Below these, tokenizing takes less time than handing it to a thread is worth.
INLINE_CHARACTERS = 16_384
_INLINE_MESSAGES = 64
_INLINE_TOKENS = 1024
# What tells a message from others, beside its role and content.
_HEAD = ("name", "tool_calls", "tool_call_id")
# So many earlier messages a policy reads at most.
_MOST_EARLIER = 8
# A prompt that is to be cut may be so many times as long as a context.
_MOST_SHORTENED = 8
_ROUGH = RoughTokenizer()


class Media(NamedTuple):
    """A part of a conversation that is no text: where it stands, and its type."""

    field: str
    kind: str


class Prompt:
    """A conversation, a text, token ids as they are, or what an encoder reads; give exactly one.

    `query` is what a policy reads: the last user message, or the text. With a conversation come the
    `tools` that it offers, if any, and its `rendering`; `media` is the first part that is no text,
    which not everybody can read. Of the prompt's tokens the last
    `keep_tokens` are kept (-1: as many as leave room for the answer; None: all). `said` is a digest
    of a conversation, `said_before` of what stands before its last answer (None: there is none).
    """

    def __init__(
        self,
        *,
        messages: Sequence[Message] | None = None,
        text: str | None = None,
        token_ids: tuple[int, ...] | None = None,
        encoding: Encoding | None = None,
        tools: Tools | None = None,
        rendering: Rendering | None = None,
        media: Media | None = None,
        keep_tokens: int | None = None,
    ) -> None:
        assert sum(part is not None for part in (messages, text, token_ids, encoding)) == 1
        self._messages = messages
        self._text = text
        self.token_ids = token_ids
        self.encoding = encoding
        self.tools = tools
        self.media = media
        self.rendering = rendering or (None if messages is None else Rendering())
        self._keep_tokens = keep_tokens
        self._cache: dict[int, tuple[int, ...]] = {}
        self._texts: dict[int, str] = {}
        # Here, and once: where a conversation is long this is done on another thread.
        self._asked = [str(m["content"]) for m in messages or () if m["role"] == "user"]
        self.said, self.said_before = _digests(messages or ())
        told = (text or "",) if encoding is None else encoding.texts
        parts = told if messages is None else (m["content"] for m in messages)
        self._num_characters = sum(map(len, parts))
        self._is_long = (
            self._num_characters > INLINE_CHARACTERS
            or len(messages or ()) > _INLINE_MESSAGES
            or tools is not None
        )

    @property
    def messages(self) -> Sequence[Message] | None:
        """The conversation, if it is one, and all of it is read."""
        return self._messages if self._keep_tokens is None else None

    @property
    def plain_text(self) -> str | None:
        """The text, if it was given as one, and all of it is read."""
        return self._text if self._keep_tokens is None else None

    @property
    def field(self) -> str:
        """The field of the request that it came in."""
        if self.encoding is not None:
            return "input"
        return "prompt" if self._messages is None else "messages"

    def shortened(self, keep_tokens: int | None) -> Prompt:
        """Return the same text or token ids, of which the last `keep_tokens` are kept."""
        return Prompt(text=self._text, token_ids=self.token_ids, keep_tokens=keep_tokens)

    async def query(self, tokenizer: Tokenizer) -> str:
        """Return what a policy reads; `tokenizer` serves to read token ids."""
        if self._messages is not None:
            return self._asked[-1] if self._asked else str(self._messages[-1]["content"])
        return await self.text(tokenizer)

    def earlier(self) -> tuple[str, ...]:
        """Return the newest of the user's messages before the last one, in their order."""
        return tuple(self._asked[:-1][-_MOST_EARLIER:])

    async def text(self, tokenizer: Tokenizer) -> str:
        """Return the text of a prompt that is no conversation. Many ids are read in a thread."""
        assert self._messages is None
        if self.encoding is not None:
            return next(iter(self.encoding.texts), "")
        if self._text is not None:
            return self._text
        key, ids = id(tokenizer), self.token_ids or ()
        if key not in self._texts:
            many = len(ids) > _INLINE_TOKENS
            self._texts[key] = (
                await asyncio.to_thread(tokenizer.decode, ids) if many else tokenizer.decode(ids)
            )
        return self._texts[key]

    def check_size(self, most_token_bytes: int, context_tokens: int | None) -> None:
        """Raise `ContextOverflow` where no such context holds so long a text; tokenizes nothing.

        No token stands for more than `most_token_bytes`.
        """
        if context_tokens is None or self.encoding is not None:
            return
        if self.token_ids is not None:
            num_tokens = len(self.token_ids)
        else:
            num_tokens = -(-self._num_characters // most_token_bytes)
        if num_tokens >= context_tokens and self._keep_tokens is None:
            raise overflow(context_tokens, f"the prompt has at least {num_tokens}", self.field)
        if num_tokens >= _MOST_SHORTENED * context_tokens:
            raise overflow(context_tokens, "the prompt is too long even to be cut", self.field)

    async def tokens(self, tokenizer: Tokenizer, room: int | None = None) -> tuple[int, ...]:
        """Return the prompt's ids. Long prompts are tokenized in a thread.

        `room` is what a prompt may have that is kept as far as there is room. Raises `RequestError`
        if the chat template refuses the conversation.
        """
        key = id(tokenizer)
        if key not in self._cache:
            if self.token_ids is not None:
                self._cache[key] = self.token_ids
            elif self._is_long:
                self._cache[key] = await asyncio.to_thread(self._encode, tokenizer)
            else:
                self._cache[key] = self._encode(tokenizer)
        ids = self._cache[key]
        if self._keep_tokens is None:
            return ids
        kept = self._keep_tokens if self._keep_tokens >= 0 else room
        return ids if kept is None else ids[max(len(ids) - kept, 0) :]

    async def count(self, tokenizer: Tokenizer) -> int:
        """Return how many tokens the prompt has, for those who choose and reckon.

        `tokenizer` need not be that of who answers: turns that its chat template refuses, as one
        without tools does, are counted roughly.
        """
        try:
            return len(await self.tokens(tokenizer))
        except RequestError:
            return len(await self.tokens(_ROUGH))

    def _encode(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        if self.encoding is not None:
            # Only how many there are counts: who encodes has a tokenizer of its own.
            given = [ids for ids in self.encoding.inputs if not isinstance(ids, str)]
            return tuple(chain(*given, *map(tokenizer.encode, self.encoding.texts)))
        if self._messages is not None and self.rendering is not None:
            tools = self.tools.functions if self.tools else ()
            return tokenizer.encode_chat(self._messages, tools, self.rendering)
        return tokenizer.encode(self._text or "")


def _digests(messages: Sequence[Message]) -> tuple[bytes, bytes | None]:
    """Return what stands for `messages`, and for those before the last answer, if there is one."""
    said = hashlib.blake2b(digest_size=16)
    before = None
    for message in messages:
        if message["role"] == "assistant":
            before = said.digest()
        content = str(message["content"]).encode("utf-8", "surrogatepass")
        more = [message.get(key) for key in _HEAD]
        told = json.dumps(more) if any(more) else ""
        said.update(f"{message['role']} {len(content)} {told}\n".encode())
        said.update(content)  # a long one in no other form, which would take the lock for long
    return said.digest(), before


def overflow(context_tokens: int, told: str, field: str) -> ContextOverflow:
    """Return the error in the words by which clients know it; `told` says what is too long."""
    return ContextOverflow(
        f"This model's maximum context length is {context_tokens} tokens, but {told}.", field
    )


@dataclass(frozen=True, kw_only=True)
class Task:
    """One choice to generate.

    `request_id` is unique per choice. `max_tokens` None means as many as the context and the
    serving limits allow. With `stream`, chunks come as they are generated; without, an engine is
    called once per answer, which is cheaper. `sent` is the client's body as it came. With
    `ceiling`, an answer may be shorter than `max_tokens` where the context ends. Nobody waits for
    one that is `offline`, nor for others after `deadline_s`, by the event loop's clock (None: not
    known).
    """

    request_id: str
    query: Query
    prompt: Prompt
    sampling: SamplingOptions
    max_tokens: int | None
    stream: bool
    client_id: str = ""
    client_weight: float = 1.0
    sent: Mapping[str, Any] | None = None
    ceiling: bool = False
    offline: bool = False
    deadline_s: float | None = None

    def judged(self) -> Task:
        """Return the same for an answer that a scorer sees, with its log-probabilities."""
        return replace(self, sampling=replace(self.sampling, logprobs=True))


async def request_of(
    answer: Answer, task: Task, path: str, *, members: Members, max_tokens: int
) -> GenerationRequest:
    """Return what an engine gets of `task` where `answer` stands in the plan at `path`.

    `max_tokens` are the answer's at most. Raises `RequestError` for what its members cannot take.
    """
    members.check_encodes(answer, task.prompt.encoding)
    now_s = asyncio.get_running_loop().time()
    timeout_s = None if task.deadline_s is None else max(0.0, task.deadline_s - now_s)
    if task.prompt.encoding is not None:
        return GenerationRequest(
            request_id=f"{task.request_id}:{path}",
            prompt_tokens=(),
            members=answer.members,
            client_id=task.client_id,
            client_weight=task.client_weight,
            user=task.query.user or "",
            timeout_s=timeout_s,
            offline=task.offline,
            encoding=task.prompt.encoding,
        )
    if task.prompt.tools is not None:
        members.check_tools(answer)
    tokenizer = members.tokenizer_of(answer.members[0])
    context_tokens = members.context_tokens(answer)
    task.prompt.check_size(tokenizer.most_token_bytes, context_tokens)
    # Where only the prompt is scored, the token after it is drawn and thrown away.
    wanted = max(task.max_tokens or 1, 1)
    max_tokens = max(max_tokens, 1)
    most = None if context_tokens is None else context_tokens - wanted
    tokens = await task.prompt.tokens(tokenizer, most)
    messages = task.prompt.messages
    if context_tokens is not None:
        room = context_tokens - len(tokens)
        if room < (1 if task.ceiling else wanted):
            told = f"the prompt has {len(tokens)} and the answer may take {wanted}"
            raise overflow(context_tokens, told, task.prompt.field)
        max_tokens = min(max_tokens, room)
    return GenerationRequest(
        request_id=f"{task.request_id}:{path}",
        prompt_tokens=tokens,
        **fusion_of(answer),
        sampling=replace(
            members.sampling(answer.members[0], task.sampling, task.sent),
            max_tokens=max_tokens,
        ),
        client_id=task.client_id,
        client_weight=task.client_weight,
        user=task.query.user or "",
        messages=(None if messages is None else members.opened(answer.members[0], messages)),
        text=task.prompt.plain_text,
        sent=members.sent(answer.members[0], task.sent),
        rendering=task.prompt.rendering,
        tools=task.prompt.tools,
        timeout_s=timeout_s,
        offline=task.offline,
        adapters=members.adapters(answer.members),
    )
