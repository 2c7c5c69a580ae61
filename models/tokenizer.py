"""Tokenizers: from text or a conversation to the token ids that an engine's members read.

The request path tokenizes once, before it knows which engine replica will answer, so this is apart
from the engines. It knows nothing of HTTP or plans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

from models.errors import PoolError, RequestError

if TYPE_CHECKING:
    from models.pool import Model

Message: TypeAlias = Mapping[str, str]
"""One turn of a conversation: `role` and `content`."""


class Tokenizer(Protocol):
    """Text to token ids and back. Thread-safe, no I/O after it is made."""

    @property
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size)."""
        ...

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of plain `text`, with what the model expects at the start of a text."""
        ...

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the ids of a conversation, ready for the assistant's next turn.

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

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
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
    """The tokenizer and chat template that a Hugging Face checkpoint folder holds."""

    def __init__(self, folder: Path) -> None:
        """Load from `folder`, without network; `PoolError` names what cannot be read."""
        from transformers import AutoTokenizer  # noqa: PLC0415 - slow to import, not always needed

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise PoolError(f"{folder}: the tokenizer cannot be loaded: {error}") from None
        self._folder = folder

    @property
    def vocab_size(self) -> int:
        """Ids are below this, added tokens included."""
        return len(self._tokenizer)

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of `text`, with the beginning-of-text token where the model has one."""
        return tuple(self._tokenizer(text)["input_ids"])

    def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the conversation through the checkpoint's chat template.

        Raises `RequestError` if the checkpoint has none, or its template refuses the roles.
        """
        from jinja2.exceptions import TemplateError  # noqa: PLC0415 - comes with transformers

        if self._tokenizer.chat_template is None:
            raise RequestError(
                f"{self._folder.name} has no chat template; use /v1/completions", "messages"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
            )
        except TemplateError as error:
            raise RequestError(
                f"messages: the chat template refuses them: {error}", "messages"
            ) from None
        # The template writes the special tokens itself.
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of `token_ids`, special tokens left out."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


def load_tokenizer(model: Model) -> Tokenizer:
    """Return the tokenizer of `model`: its checkpoint's, or bytes where it has no checkpoint."""
    return ByteTokenizer() if model.card is None else CheckpointTokenizer(model.card.path)
