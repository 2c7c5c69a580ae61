"""What llama.cpp makes of a given text: its tokens are forced, and it tells how likely each was.

llama.cpp's server tells likelihoods of tokens that it draws, not of those that it reads. So a
grammar holds it to the text's next tokens, some at a time, and what it has read stays in its slot
for those that follow. It tells nothing of tokens that end within a character or that end an answer:
these are weighed against another one, which is made to be drawn in their place.

As slow as writing the text would be. Shapes: T tokens of the text.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from models.engines.base import Token
from models.engines.llamacpp.binding import Event
from models.engines.llamacpp.translate import raise_failure, told_token
from models.engines.text import Vocabulary
from models.errors import EngineFailed

# Forced at once; others' requests and a cancellation wait as long.
_AT_ONCE = 64
# Further above others than logits are apart; and as far apart that one of the two is drawn, but not
# so far that the other's probability is no 32-bit number any more. In nats.
_RAISED, _APART = 100.0, 40.0
_LEAST = 1e-45

Ask = Callable[[Mapping[str, Any]], AsyncIterator[Event]]
"""Asks llama.cpp's server something, and yields its messages."""


async def score(
    tokens_T: Sequence[int], ask: Ask, vocabulary: Vocabulary, *, vocab_size: int, num_top: int
) -> tuple[Token, ...]:
    """Return `tokens_T` with their log-probabilities and `num_top` alternatives each.

    The first has none. Raises what `ask` raises, and `EngineFailed`.
    """
    first = {"id": tokens_T[0], "logprob": None, "top_logprobs": ()}
    found = [told_token(first, vocabulary, num_top)]
    while len(found) < len(tokens_T):
        rest = tokens_T[len(found) : len(found) + _AT_ONCE]
        num_whole = next((n for n, one in enumerate(rest) if not _is_whole(one, vocabulary)), None)
        told = await _forced(tokens_T[: len(found)], rest[:num_whole], ask, num_top)
        pairs = zip(told, rest, strict=False)
        told = [entry for entry, _ in takewhile(lambda pair: pair[0]["id"] == pair[1], pairs)]
        if not told:
            read = tokens_T[: len(found)]
            other = next(i for i in range(vocab_size) if vocabulary.raw(i).isalpha())
            told = [await _weighed(read, rest[0], other, ask, num_top)]
        found += [told_token(entry, vocabulary, num_top) for entry in told]
    return tuple(found)


async def _forced(
    read: Sequence[int], following: Sequence[int], ask: Ask, num_top: int
) -> list[Mapping[str, Any]]:
    """Return what llama.cpp tells of the tokens `following` after those that it has `read`."""
    if not following:
        return []
    grammar = "%llguidance {}\nstart: " + " ".join(f"<[{token}]>" for token in following)
    return await _drawn(
        ask, read, max_tokens=len(following), grammar=grammar, n_probs=max(num_top, 1)
    )


async def _weighed(
    read: Sequence[int], token: int, other: int, ask: Ask, num_top: int
) -> Mapping[str, Any]:
    """Return what llama.cpp would tell of `token`, which is none that it tells, after `read`.

    Both tokens are raised above all others, and `other` so far above `token` that it is drawn. What
    they are drawn with tells how likely they are to each other.
    """
    forced = await _forced(read, [other], ask, num_top)
    drawn = await _drawn(
        ask,
        read,
        max_tokens=1,
        n_probs=2,
        post_sampling_probs=True,
        temperature=1,
        logit_bias=[[token, _RAISED], [other, _RAISED + _APART]],
    )
    probs = {one["id"]: one["prob"] for entry in drawn for one in entry["top_probs"]}
    if not forced or not probs.keys() >= {token, other}:
        raise EngineFailed(f"llama.cpp does not tell how likely the token {token} is")
    apart = math.log(max(probs[token], _LEAST) / probs[other]) + _APART
    return {**forced[0], "id": token, "logprob": forced[0]["logprob"] + apart}


async def _drawn(ask: Ask, read: Sequence[int], **fields: object) -> list[Mapping[str, Any]]:
    """Return what llama.cpp tells of the tokens that it draws after `read`."""
    body = {
        "prompt": list(read),
        "samplers": ["temperature"],
        "temperature": 0,
        "stream": True,
        "return_progress": True,
        **fields,
    }
    told: list[Mapping[str, Any]] = []
    async for event in ask(body):
        raise_failure(event)
        for choice in event["choices"]:
            told += (choice.get("logprobs") or {}).get("content") or ()
    return told


def _is_whole(token: int, vocabulary: Vocabulary) -> bool:
    try:
        vocabulary.raw(token).decode()
    except UnicodeDecodeError:
        return False
    return True
