"""Fusing members with different tokenizers: UniTE (Yao et al. 2024), over token strings.

At each step every member, on whichever engine, reads the prompt and the text so far in its own
tokens and names its likeliest next ones. The strings of the members' top `TOP` form the union; a
member that did not name a string gives it the probability of the first of its own tokens that the
string starts with, and to one not named either the mean of what is left. The fused distribution
over the union picks a string, which is appended to the text, and so on. Only strings that are whole
characters take part, since the next step must read them in every tokenizer.

Slow: each step is a round trip, and engines that keep no prompts read them again. It is for
combining models that share nothing but text; members with one tokenizer belong into one engine.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass

from models.adapter import AdapterSource
from models.engines.base import Chunk, FinishReason, GenerationRequest, SamplingOptions, Token
from models.engines.text import TextStream
from models.errors import RequestError
from models.tokenizer import Tokenizer
from policies.plan import Answer
from router.engines import EngineClient
from router.executor.task import Task
from router.executor.trace import Run

TOP = 10
"""How many strings each member puts into the union."""
_ALTERNATIVES = 20  # what an engine tells of; more than TOP, to know what members think of others'
END = ""
"""The string of every end-of-sequence token."""


@dataclass(frozen=True, kw_only=True)
class Opinion:
    """What a member thinks comes next: log-probabilities by string, best first; "" ends.

    `rest` is the log-probability of any one token that it did not name.
    """

    named: Mapping[str, float]
    rest: float

    def of(self, text: str, first_token: str) -> float:
        """Return the log-probability of `text`, whose first own token is `first_token`."""
        return self.named.get(text, self.named.get(first_token, self.rest))


async def unite(
    answer: Answer,
    task: Task,
    run: Run,
    *,
    clients: Sequence[EngineClient],
    tokenizers: Sequence[Tokenizer],
    adapters: Mapping[str, AdapterSource],
    max_tokens: int,
    context_tokens: int | None,
) -> AsyncGenerator[Chunk, None]:
    """Yield the answer of members that run on different engines, a string at a time.

    `clients` and `tokenizers` are the members', in their order, `adapters` by name. Raises
    `RequestError` for options that need one vocabulary, and what engines raise.
    """
    _check(task.sampling)
    if task.prompt.tools is not None:
        raise RequestError(
            "tools are not supported where members with different tokenizers are fused", "tools"
        )
    if task.prompt.token_ids is not None:
        raise RequestError(
            "prompt: token ids mean something else to each of members with different tokenizers; "
            "send the text",
            "prompt",
        )
    prompts = [await task.prompt.tokens(tokenizer) for tokenizer in tokenizers]
    run.prompt_tokens = max(map(len, prompts))
    relative = answer.weights or (1.0,) * len(answer.members)
    run.weights = tuple(weight / sum(relative) for weight in relative)
    rng = random.Random(task.sampling.seed)
    stream = TextStream(task.sampling.stop, include_stop=task.sampling.include_stop)
    if not max_tokens:  # nothing but the prompt is wanted
        yield Chunk(text="", tokens=(), finish_reason="length", weights=run.weights)
        return
    text, request_id = "", f"{task.request_id}:{run.path}"
    longest = context_tokens or math.inf
    for step in range(max_tokens):
        reads = [
            (*prompt, *continuation(tokenizer, text))
            for prompt, tokenizer in zip(prompts, tokenizers, strict=True)
        ]
        if step and max(map(len, reads)) >= longest:
            # A string of one tokenizer may be many tokens of another, so this is known only now.
            yield Chunk(
                text=stream.finish(), tokens=(), finish_reason="length", weights=run.weights
            )
            return
        opinions = await asyncio.gather(
            *(
                _ask(client, tokenizer, name, tokens, f"{request_id}:{step}-{name}", adapters)
                for client, tokenizer, name, tokens in zip(
                    clients, tokenizers, answer.members, reads, strict=True
                )
            )
        )
        fused = fuse_strings(opinions, tokenizers, run.weights, product=answer.rule == "product")
        piece = _draw(fused, task.sampling.temperature, rng)
        run.output_tokens += 1
        text += piece
        shown = stream.push(piece.encode())
        reason: FinishReason | None = None
        if piece == END or stream.stopped:
            reason = "stop"
        elif step == max_tokens - 1:
            reason = "length"
        if reason is not None and not stream.stopped:
            shown += stream.finish()
        # A string is no one's token: it has no id.
        token = Token(token_id=0, text=piece, raw=piece.encode(), logprob=fused[piece])
        weights = run.weights if reason else None
        yield Chunk(
            text=shown, tokens=(token,), finish_reason=reason, stop=stream.stop, weights=weights
        )
        if reason is not None:
            return


def fuse_strings(
    opinions: Sequence[Opinion],
    tokenizers: Sequence[Tokenizer],
    weights: Sequence[float],
    *,
    product: bool = False,
) -> dict[str, float]:
    """Return the fused log-probabilities of the union's strings, normalised over the union."""
    union = dict.fromkeys(text for one in opinions for text in list(one.named)[:TOP])
    fused: dict[str, float] = {}
    for text in union:
        logs = [
            one.of(text, first_string(tokenizer, text))
            for one, tokenizer in zip(opinions, tokenizers, strict=True)
        ]
        if product:
            fused[text] = math.fsum(w * log for w, log in zip(weights, logs, strict=True))
        else:
            mixed = math.fsum(w * math.exp(log) for w, log in zip(weights, logs, strict=True))
            fused[text] = math.log(max(mixed, 1e-300))
    highest = max(fused.values())
    total = highest + math.log(math.fsum(math.exp(v - highest) for v in fused.values()))
    return {text: value - total for text, value in fused.items()}


def continuation(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Return the ids of `text` without what a tokenizer puts at the start of a text."""
    return tokenizer.encode(text)[len(tokenizer.encode("")) :] if text else ()


def first_string(tokenizer: Tokenizer, text: str) -> str:
    """Return the string of the first token of `text`."""
    ids = continuation(tokenizer, text)
    return tokenizer.decode(ids[:1]) if ids else END


async def _ask(
    client: EngineClient,
    tokenizer: Tokenizer,
    name: str,
    tokens: tuple[int, ...],
    request_id: str,
    adapters: Mapping[str, AdapterSource],
) -> Opinion:
    """Return what a member thinks comes after `tokens`."""
    chunk = await client.complete(
        GenerationRequest(
            request_id=request_id,
            prompt_tokens=tokens,
            members=(name,),
            sampling=SamplingOptions(max_tokens=1, temperature=0, top_logprobs=_ALTERNATIVES),
            adapters={name: adapters[name]} if name in adapters else {},
        )
    )
    alternatives = chunk.tokens[0].top if chunk.tokens else ()
    # Servers that keep the end's log-probability to themselves only say that it is likeliest.
    named: dict[str, float] = {} if alternatives else {END: 0.0}
    for other in alternatives:
        try:
            text = other.raw.decode()
        except UnicodeDecodeError:
            continue  # part of a character
        # The likelier one counts where two tokens look the same, as special ones do.
        named.setdefault(text, other.logprob)
    left = 1 - math.fsum(math.exp(other.logprob) for other in alternatives) if alternatives else 0
    unnamed = tokenizer.vocab_size - len(alternatives)
    return Opinion(named=named, rest=math.log(max(left, 1e-12) / max(unnamed, 1)))


def _draw(fused: Mapping[str, float], temperature: float, rng: random.Random) -> str:
    ranked = sorted(fused, key=lambda text: (-fused[text], text))
    if temperature < 1e-5:
        return ranked[0]
    shares = [math.exp((fused[text] - fused[ranked[0]]) / temperature) for text in ranked]
    return rng.choices(ranked, shares)[0]


def _check(sampling: SamplingOptions) -> None:
    """Refuse what speaks of token ids, or of a whole vocabulary."""
    wanted = {
        "logit_bias": bool(sampling.logit_bias),
        "response_format": sampling.structure is not None,
        "repetition_penalty": sampling.repetition_penalty != 1,
        "min_tokens": sampling.min_tokens > 0,
        "stop_token_ids": bool(sampling.stop_token_ids),
        "echo": sampling.prompt_logprobs is not None,
        "presence_penalty": sampling.presence_penalty != 0,
        "frequency_penalty": sampling.frequency_penalty != 0,
        "top_logprobs": bool(sampling.top_logprobs),
        "top_p": sampling.top_p < 1,
        "top_k": sampling.top_k is not None,
        "min_p": sampling.min_p is not None,
        "ignore_eos": sampling.ignore_eos,
    }
    for name, asked in wanted.items():
        if asked:
            raise RequestError(
                f"{name} is not supported where members with different tokenizers are fused", name
            )
