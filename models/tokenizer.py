"""Tokenizers: from text or a conversation to the token ids that an engine's members read.

The request path tokenizes once, before it knows which engine replica will answer, so this is apart
from the engines. It knows nothing of HTTP or plans.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from models.chat_template import (
    Message,
    Rendering,
    open_conversation,
    read_chat_template,
)
from models.errors import PoolError, RequestError
from models.tokenizer_json import encode_all, read_tokenizer

if TYPE_CHECKING:
    from models.spec import Model


_USUAL = Rendering()


class Tokenizer(Protocol):
    """Text to token ids and back. Thread-safe, no I/O after it is made.

    Encoding holds the interpreter's lock for no longer than copying takes.
    """

    @property
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size)."""
        ...

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Return the ids of plain `text`, if `special` with what the model wants around a text."""
        ...

    def token_text(self, token_id: int) -> str:
        """Return a token as the vocabulary has it; empty if it hasn't."""
        ...

    @property
    def most_token_bytes(self) -> int:
        """No token stands for more bytes of text than this."""
        ...

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        rendering: Rendering = _USUAL,
    ) -> tuple[int, ...]:
        """Return the ids of a conversation, ready for the assistant's next turn.

        `tools` are the functions that the assistant may call. `rendering` may ask for another end.

        Raises `RequestError` where the model's chat template refuses the conversation.
        """
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, special tokens left out."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0-255 and one end-of-turn id; needs no checkpoint and loses nothing.

    A turn is the role, a newline, the content and `END_OF_TURN`.
    """

    END_OF_TURN = 256

    @property
    def vocab_size(self) -> int:
        """256 bytes and the end of a turn."""
        return 257

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:  # noqa: ARG002
        """Return the bytes of `text`."""
        return tuple(text.encode())

    def token_text(self, token_id: int) -> str:
        """Return the byte's character, U+FFFD for a part of one."""
        return self.decode([token_id])

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),  # noqa: ARG002 - who reads bytes calls none
        rendering: Rendering = _USUAL,
    ) -> tuple[int, ...]:
        """Return the turns one after another, and the head of the assistant's."""
        ids: list[int] = []
        for message in messages:
            ids += f"{message['role']}\n{message['content']}".encode()
            ids.append(self.END_OF_TURN)
        if rendering.continue_final:
            ids.pop()
        elif rendering.generation_prompt:
            ids += b"assistant\n"
        return tuple(ids)

    @property
    def most_token_bytes(self) -> int:
        """One byte is one token."""
        return 1

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of the bytes; incomplete characters become U+FFFD."""
        return bytes(i for i in token_ids if i < self.END_OF_TURN).decode(errors="replace")


class CheckpointTokenizer:
    """The tokenizer and chat template of a checkpoint, a Hugging Face folder or a .gguf file.

    Uses the `tokenizers` library: the same ids as transformers' tokenizers, without the ten seconds
    of CPU time that importing those takes.
    """

    def __init__(self, path: Path, *, system: str | None = None) -> None:
        """Load from `path`, without network; `PoolError` names what cannot be read.

        The message `system` opens conversations that have none of its kind.
        """
        self._system = system
        self._tokenizer = read_tokenizer(path)
        self._template = read_chat_template(path)

    def token_text(self, token_id: int) -> str:
        """Return a token as the vocabulary has it; empty if it hasn't."""
        return self._tokenizer.id_to_token(token_id) or ""

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can work."""
        return self._template is not None

    @property
    def vocab_size(self) -> int:
        """Ids are below this, added tokens included."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """Return the ids of `text`, with the beginning-of-text token where the model has one.

        Raises `RequestError` for a text that the tokenizer cannot encode.
        """
        [found] = encode_all(self._tokenizer, [text], special=special)
        return tuple(found.ids)

    @cached_property
    def most_token_bytes(self) -> int:
        """The longest token's text, in UTF-8: never less than the bytes that it stands for."""
        return max(len(token.encode()) for token in self._tokenizer.get_vocab())

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        rendering: Rendering = _USUAL,
    ) -> tuple[int, ...]:
        """Return the conversation through the checkpoint's chat template.

        Raises `RequestError` if the checkpoint has none, or its template refuses the roles.
        """
        if self._template is None:
            raise RequestError("the model has no chat template; use /v1/completions", "messages")
        # The template writes the special tokens itself.
        text = self._template.render(open_conversation(messages, self._system), tools, rendering)
        return self.encode(text, special=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, special tokens left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


class RoughTokenizer:
    """Counts tokens where nobody knows the tokenizer: one per four bytes, the rule of thumb for
    English. The ids are all 0 and mean nothing; they cannot be decoded.
    """

    BYTES_PER_TOKEN = 4
    most_token_bytes = 128
    """Longer than any token of ordinary vocabularies that stands for text."""

    @property
    def vocab_size(self) -> int:
        """There is one id."""
        return 1

    def encode(self, text: str, *, special: bool = True) -> tuple[int, ...]:  # noqa: ARG002
        """Return about as many ids as `text` has tokens."""
        return (0,) * -(-len(text.encode()) // self.BYTES_PER_TOKEN)

    def token_text(self, token_id: int) -> str:  # noqa: ARG002 - the contract
        """Return nothing, as `decode` does."""
        return ""

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        rendering: Rendering = _USUAL,  # noqa: ARG002 - a few tokens are not counted so exactly
    ) -> tuple[int, ...]:
        """Return about as many ids as the conversation has tokens, a role counted like a word."""
        turns = "\n".join(f"{m['role']}\n{m['content']}\n" for m in messages)
        return self.encode(turns + "".join(json.dumps(dict(tool)) for tool in tools))

    def decode(self, token_ids: Sequence[int]) -> str:  # noqa: ARG002 - the contract
        """Return nothing: the text is not in the ids."""
        return ""


def load_tokenizers(models: Iterable[Model]) -> dict[str, Tokenizer]:
    """Return every model's tokenizer by name; models that prompt alike share one.

    Two models with one tokenizer and different chat templates have one each. Raises `PoolError`.
    """
    loaded: dict[object, Tokenizer] = {}
    by_model: dict[str, Tokenizer] = {}
    for model in models:
        remote = model.spec.remote is not None
        prompts = model.card.prompt_sha256 if model.card else (model.tokenizer, remote)
        key = (prompts, model.spec.system)
        if key not in loaded:
            try:
                loaded[key] = load_tokenizer(model)
            except PoolError as error:
                where = "remote.tokenizer" if remote else "checkpoint"
                raise PoolError(f"models.{model.name}.{where}: {error}") from None
        by_model[model.name] = loaded[key]
    return by_model


def load_tokenizer(model: Model) -> Tokenizer:
    """Return the tokenizer of `model`: bytes where a checkpoint-free engine runs it here.

    For a remote model without one, a tokenizer that only counts. Raises `PoolError`.
    """
    if model.tokenizer is not None:
        tokenizer = CheckpointTokenizer(model.tokenizer, system=model.spec.system)
        if model.spec.remote is not None and not tokenizer.has_chat_template:
            raise PoolError(f"{model.tokenizer} holds no chat template")
        return tokenizer
    return ByteTokenizer() if model.spec.remote is None else RoughTokenizer()
