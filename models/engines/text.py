"""From token ids to text, as it comes: whole characters only, and never part of a stop string."""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Iterable
from pathlib import Path

import tokenizers
from llguidance import LLTokenizer

from models.errors import PoolError
from models.tokenizer_json import read_tokenizer


class Vocabulary:
    """The raw bytes of every token; empty for special tokens, which leave no text.

    Which are special is the tokenizer's own word: `<think>` is text where it says no more, and so
    are the `marks` whatever it says.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        grammars: LLTokenizer,
        marks: Collection[str] = (),
    ) -> None:
        """Take the bytes of ordinary tokens from `grammars`, which has them all at hand."""
        self.grammars = grammars
        added = {
            i: token
            for i, token in tokenizer.get_added_tokens_decoder().items()
            if i < grammars.vocab_size
        }
        self._added = {token.content: i for i, token in added.items()}
        raw = [bytes(grammars.decode_bytes([i])) for i in range(grammars.vocab_size)]
        for i in range(tokenizer.get_vocab_size(), grammars.vocab_size):  # a padded vocabulary
            raw[i] = b""
        for i, token in added.items():
            hidden = token.special and token.content not in marks
            raw[i] = b"" if hidden else token.content.encode()
        self._raw = tuple(raw)

    @classmethod
    def read(
        cls, path: Path, *, size: int, marks: Collection[str], ends: Iterable[int] = ()
    ) -> Vocabulary:
        """Return that of a checkpoint that embeds `size` tokens, of which `ends` end answers.

        Raises `PoolError`.
        """
        tokenizer = read_tokenizer(path)
        num_tokens = tokenizer.get_vocab_size(with_added_tokens=False)
        if num_tokens > size:
            raise PoolError(
                f"{path}: the tokenizer has {num_tokens} tokens, but the model a vocab_size of "
                f"{size}: some would have no embedding"
            )
        known = json.loads(tokenizer.to_str())
        # Fine-tuning often adds a token for padding, for which the model has no embedding.
        known["added_tokens"] = [token for token in known["added_tokens"] if token["id"] < size]
        try:
            grammars = LLTokenizer(json.dumps(known), n_vocab=size, eos_token=sorted(ends) or None)
        except ValueError as error:
            raise PoolError(f"{path}: the tokenizer cannot be loaded: {error}") from None
        return cls(tokenizer, grammars, marks)

    def raw(self, token: int) -> bytes:
        """Return the bytes that `token` stands for."""
        return self._raw[token]

    def text(self, tokens: Iterable[int]) -> str:
        """Return the text of `tokens`; what is no whole character becomes U+FFFD."""
        return b"".join(map(self.raw, tokens)).decode(errors="replace")

    def terminal(self, tag: str) -> str:
        """Return what stands in a grammar for `tag`: its own token, if it has one, or its text."""
        return f"<[{self._added[tag]}]>" if tag in self._added else json.dumps(tag)


class TextStream:
    """Turns tokens' bytes into text that may be shown.

    Text is held back while it may be the beginning of a stop string, bytes while their character
    is incomplete. `stop` is set once a stop string stands in the text, to that string; what follows
    is never returned, nor is it itself unless `include_stop`.
    """

    def __init__(self, stop: Iterable[str], *, include_stop: bool = False) -> None:
        self._stops = tuple(stop)
        self._include_stop = include_stop
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stop: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether the text is over."""
        return self.stop is not None

    def push(self, raw: bytes) -> str:
        """Add a token's bytes; return the text that is now certain."""
        return self._release(self._decoder.decode(raw))

    def finish(self) -> str:
        """Return what was held back; an incomplete character becomes U+FFFD."""
        text = self._release(self._decoder.decode(b"", final=True))
        text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        if not self._stops:
            return text
        self._held += text
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stop = min(found)
            told, self._held = self._held[: at + len(self.stop) * self._include_stop], ""
            return told
        keep = max(overlap(self._held, stop) for stop in self._stops)
        certain = len(self._held) - keep
        text, self._held = self._held[:certain], self._held[certain:]
        return text


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
