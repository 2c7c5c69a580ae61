"""Log-probabilities on the wire. The end-of-sequence token has no text and isn't shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from models.engines.base import Token, TopLogprob


def chat_logprobs(tokens: Sequence[Token]) -> dict[str, Any]:
    """Return a chat choice's `logprobs`."""
    return {
        "content": [
            {**_item(token), "top_logprobs": [_item(other) for other in token.top]}
            for token in tokens
            if token.raw
        ],
        "refusal": None,
    }


def text_logprobs(tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    """Return a text completion's `logprobs`; `offset` is where the first token's text starts."""
    shown = [token for token in tokens if token.raw]
    offsets = []
    for token in shown:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in shown],
        "token_logprobs": [token.logprob for token in shown],
        "top_logprobs": [{other.text: other.logprob for other in token.top} for token in shown],
        "text_offset": offsets,
    }


def _item(token: Token | TopLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": list(token.raw)}
