"""Log-probabilities on the wire. The end-of-sequence token has no text and isn't shown.

Where a prompt is scored with its answer, all tokens are: those who measure count them.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from models.engines.base import Token, TopLogprob


class Offsets:
    """Where tokens start in the text that they make, in characters.

    A token that continues a character starts where that character does.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_characters = 0

    def skip(self, tokens: Iterable[Token]) -> list[int]:
        """Return where each of the next `tokens` starts."""
        starts = []
        for token in tokens:
            starts.append(self._num_characters)
            self._num_characters += len(self._decoder.decode(token.raw))
        return starts


def chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    """Return a chat choice's `logprobs`."""
    return {
        "content": [
            {**_item(token), "top_logprobs": [_item(other) for other in token.top]}
            for token in tokens
            if token.raw and not token.thought
        ],
        "refusal": None,
    }


def text_logprobs(
    tokens: Sequence[Token], offsets: Offsets, prompt: Sequence[Token] | None = None
) -> dict[str, Any]:
    """Return a text completion's `logprobs`, after those of its `prompt` where that is echoed."""
    starts = offsets.skip([*(prompt or ()), *tokens])
    pairs = list(zip([*(prompt or ()), *tokens], starts, strict=True))
    shown = [(token, start) for token, start in pairs if token.raw or prompt is not None]
    return {
        "tokens": [label(token) for token, _ in shown],
        "token_logprobs": [token.logprob for token, _ in shown],
        "top_logprobs": [_alternatives(token) for token, _ in shown],
        "text_offset": [start for _, start in shown],
    }


def label(token: Token | TopLogprob) -> str:
    """Return a token's text; its bytes, as OpenAI writes them, where they are no whole text."""
    try:
        return token.raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw)


def _alternatives(token: Token) -> dict[str, float] | None:
    """Return the likeliest tokens by label, best first, the drawn one among them.

    Of several with one label the others go by their ids. None for a prompt's first token.
    """
    if token.logprob is None:
        return None
    named = {label(token): token.logprob}
    for other in token.top:
        if (other.token_id, other.raw) != (token.token_id, token.raw):
            name = label(other)
            named[f"token_id:{other.token_id}" if name in named else name] = other.logprob
    return dict(sorted(named.items(), key=lambda item: -item[1]))


def _item(token: Token | TopLogprob) -> dict[str, Any]:
    return {"token": label(token), "logprob": token.logprob, "bytes": list(token.raw)}
