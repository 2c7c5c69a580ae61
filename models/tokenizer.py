"""Tokenizers: from text or a conversation to the token ids that an engine's members read.

The request path tokenizes once, before it knows which engine replica will answer, so this is apart
from the engines. It knows nothing of HTTP or plans.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from models.chat_template import Message, read_chat_template
from models.errors import PoolError, RequestError

if TYPE_CHECKING:
    from models.spec import Model


class Tokenizer(Protocol):
    """Text to token ids and back. Thread-safe, no I/O after it is made."""

    @property
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size)."""
        ...

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of plain `text`, with what the model expects at the start of a text."""
        ...

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[int, ...]:
        """Return the ids of a conversation, ready for the assistant's next turn.

        `tools` are the functions that the assistant may call.

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

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the bytes of `text`."""
        return tuple(text.encode())

    def encode_chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),  # noqa: ARG002 - who reads bytes calls none
    ) -> tuple[int, ...]:
        """Return the turns one after another, and the head of the assistant's."""
        ids: list[int] = []
        for message in messages:
            ids += f"{message['role']}\n{message['content']}".encode()
            ids.append(self.END_OF_TURN)
        ids += b"assistant\n"
        return tuple(ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of the bytes; incomplete characters become U+FFFD."""
        return bytes(i for i in token_ids if i < self.END_OF_TURN).decode(errors="replace")


class CheckpointTokenizer:
    """The tokenizer and chat template that a Hugging Face checkpoint folder holds.

    Reads tokenizer.json with the `tokenizers` library: the same ids as transformers' tokenizers,
    without the ten seconds of CPU time that importing those takes.
    """

    def __init__(self, folder: Path) -> None:
        """Load from `folder`, without network; `PoolError` names what cannot be read."""
        import tokenizers  # noqa: PLC0415 - not needed where no model has a checkpoint

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare exceptions
            raise PoolError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._template = read_chat_template(folder)

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can work."""
        return self._template is not None

    @property
    def vocab_size(self) -> int:
        """Ids are below this, added tokens included."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of `text`, with the beginning-of-text token where the model has one."""
        return tuple(self._tokenizer.encode(text).ids)

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[int, ...]:
        """Return the conversation through the checkpoint's chat template.

        Raises `RequestError` if the checkpoint has none, or its template refuses the roles.
        """
        if self._template is None:
            raise RequestError("the model has no chat template; use /v1/completions", "messages")
        # The template writes the special tokens itself.
        text = self._template.render(messages, tools)
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, special tokens left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


class RoughTokenizer:
    """Counts tokens where nobody knows the tokenizer: one per four bytes, the rule of thumb for
    English. The ids are all 0 and mean nothing; they cannot be decoded.
    """

    BYTES_PER_TOKEN = 4

    @property
    def vocab_size(self) -> int:
        """There is one id."""
        return 1

    def encode(self, text: str) -> tuple[int, ...]:
        """Return about as many ids as `text` has tokens."""
        return (0,) * -(-len(text.encode()) // self.BYTES_PER_TOKEN)

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[int, ...]:
        """Return about as many ids as the conversation has tokens, a role counted like a word."""
        turns = "\n".join(f"{m['role']}\n{m['content']}\n" for m in messages)
        return self.encode(turns + "".join(json.dumps(dict(tool)) for tool in tools))

    def decode(self, token_ids: Sequence[int]) -> str:  # noqa: ARG002 - the contract
        """Return nothing: the text is not in the ids."""
        return ""


def load_tokenizer(model: Model) -> Tokenizer:
    """Return the tokenizer of `model`: bytes where a checkpoint-free engine runs it here.

    For a remote model without one, a tokenizer that only counts. Raises `PoolError`.
    """
    if model.tokenizer is not None:
        tokenizer = CheckpointTokenizer(model.tokenizer)
        if model.spec.remote is not None and not tokenizer.has_chat_template:
            raise PoolError(f"{model.tokenizer} holds no chat template")
        return tokenizer
    return ByteTokenizer() if model.spec.remote is None else RoughTokenizer()
