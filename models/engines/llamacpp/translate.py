"""Between Shoal's requests and llama.cpp's server: its request there, chunks back.

llama.cpp's server tells likelihoods of tokens that it draws, not of those that it reads. To `score`
a text, a grammar holds it to the text's next tokens, some at a time, and what it has read stays in
its slot for those that follow. It tells nothing of tokens that end within a character or that end
an answer: these are weighed against another one, which is made to be drawn in their place. That is
as slow as writing the text would be. Shapes: T tokens of the text.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from models.engines.base import Chunk, FinishReason, GenerationRequest, Token, TopLogprob
from models.engines.llamacpp.binding import Event
from models.engines.text import TextStream, Vocabulary
from models.errors import ContextOverflow, EngineError, EngineFailed, EngineOverloaded, RequestError

# llama.cpp reads the largest as "draw a fresh one".
_NUM_SEEDS = 2**32 - 1
_FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}


def write_body(
    request: GenerationRequest,
    *,
    max_tokens: int,
    context_tokens: int,
    grammar: str | None = None,
    marks: Sequence[str] = (),
) -> dict[str, Any]:
    """Return `request` as llama.cpp's server wants it: held to `grammar`, the `marks` left in.

    Filters apply in the order of our own sampler. Penalties count the prompt's tokens, too:
    llama.cpp cannot leave them out. Stop strings are ours.
    """
    sampling = request.sampling
    # Tokens come with their ids only where likelihoods are told, and those of a whole vocabulary
    # take as long to sort as the model takes for the token.
    tells = sampling.logprobs or sampling.stop_token_ids
    body: dict[str, Any] = {
        "prompt": list(request.prompt_tokens),
        "n_probs": max(sampling.top_logprobs or 0, 1) if tells else 0,
        "preserved_tokens": list(marks),
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_progress": True,  # so that a long prompt can be cancelled
        "timings_per_token": True,  # counts the tokens
        "max_tokens": max_tokens,
        "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or 0,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p or 0.0,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": context_tokens,
        "logit_bias": [[token, bias] for token, bias in sampling.logit_bias.items()],
        "seed": -1 if sampling.seed is None else sampling.seed % _NUM_SEEDS,
        # What a prompt is read with rounds it: with a seed, the same each time.
        "cache_prompt": sampling.seed is None,
        "ignore_eos": sampling.ignore_eos,
    }
    if grammar is not None:
        body["grammar"] = grammar
    return body


class MessageReader:
    """Reads one answer's messages. `stopped` turns true once a stop string stands in its text."""

    def __init__(self, request: GenerationRequest, vocabulary: Vocabulary) -> None:
        self.num_tokens = 0
        self._vocabulary = vocabulary
        self._num_top = request.sampling.top_logprobs or 0
        self._stop_tokens = frozenset(request.sampling.stop_token_ids)
        self._include_stop = request.sampling.include_stop
        self._ended: int | None = None
        self._text = TextStream(request.sampling.stop, include_stop=self._include_stop)
        self._reason: FinishReason | None = None
        self._num_cached: int | None = None

    @property
    def stopped(self) -> bool:
        """Whether the answer is over before llama.cpp knows."""
        return self._ended is not None or self._text.stopped

    def read(self, event: Event) -> Chunk | None:
        """Return what a message adds, None if nothing; raises what it reports."""
        raise_failure(event)
        usage = event.get("usage")
        tokens: tuple[Token, ...] = ()
        text = wrote = ""
        for choice in event["choices"]:
            reason = choice["finish_reason"]
            if reason is not None:
                self._reason = _FINISH_REASONS.get(reason, "stop")
            logprobs = choice.get("logprobs") or {}
            entries = logprobs.get("content") or ()
            tokens += tuple(told_token(entry, self._vocabulary, self._num_top) for entry in entries)
            ids = [entry["id"] for entry in entries if entry["id"] in self._stop_tokens]
            self._ended = next(iter(ids), self._ended)
            wrote += choice.get("text") or ""
            if self._ended is None or self._include_stop:
                text += self._text.push((choice.get("text") or "").encode())
        counted = (event.get("timings") or {}).get("predicted_n", 0)
        if usage is not None:
            counted = usage["completion_tokens"]
            self._num_cached = usage["prompt_tokens_details"]["cached_tokens"]
        # Tokens that end within a character are only counted: it comes with the one that ends it.
        missing = max(counted - self.num_tokens - len(tokens), 0)
        if missing and not tokens:
            tokens, missing = (_only_text(wrote),), missing - 1
        tokens = (_only_text(""),) * missing + tokens
        self.num_tokens += len(tokens)
        return Chunk(text=text, tokens=tokens) if tokens or text else None

    def last(self) -> Chunk:
        """Return the end of the answer; raises `EngineFailed` where llama.cpp did not reach it."""
        if self.stopped:
            self._reason = "stop"
        if self._reason is None:
            raise EngineFailed("llama.cpp ended an answer before its end")
        return Chunk(
            text=self._text.finish(),
            cached_tokens=self._num_cached,
            tokens=(),
            finish_reason=self._reason,
            stop=self._ended if self._text.stop is None else self._text.stop,
        )


def told_token(entry: Mapping[str, Any], vocabulary: Vocabulary, num_top: int) -> Token:
    """Return a token as a message tells it, with at most `num_top` alternatives."""
    return Token(
        token_id=entry["id"],
        raw=vocabulary.raw(entry["id"]),
        logprob=entry["logprob"],
        top=tuple(
            TopLogprob(
                token_id=other["id"], raw=vocabulary.raw(other["id"]), logprob=other["logprob"]
            )
            for other in entry["top_logprobs"][:num_top]
        ),
    )


def _only_text(text: str) -> Token:
    """Return a token of which no more is known."""
    return Token(token_id=0, raw=text.encode(), logprob=None)


def raise_failure(event: Event) -> None:
    """Raise what a message reports, if it is an error."""
    if "error" in event:
        raise _failure(event["error"])


def _failure(error: Mapping[str, Any]) -> EngineError | RequestError:
    """Return what an error message means."""
    message = str(error.get("message"))
    if error.get("type") == "exceed_context_size_error":
        return ContextOverflow(message)
    if error.get("code") == 400:
        return RequestError(message)
    if error.get("code") == 503:
        return EngineOverloaded(message)
    return EngineFailed(f"llama.cpp failed: {message}")


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
