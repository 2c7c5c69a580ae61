"""Fusing members with different tokenizers: UniTE (Yao et al. 2024), over token strings.

At each step every member, on whichever engine, reads the prompt and the text so far in its own
tokens and names its likeliest next ones. The strings of the members' top `TOP` form the union; a
member that did not name a string gives it the probability of the first of its own tokens that the
string starts with, and to one not named either the mean of what is left. The fused distribution
over the union picks a string, which is appended to the text, and so on. Only strings that are whole
characters take part, since the next step must read them in every tokenizer.

A given text is scored in the shortest strings that every member reads as whole tokens, each with
the probabilities that its tokens have under the members: by the rule mixture their weighted mean,
which for members with one tokenizer is the mixture token by token; by the rule product what it
would be drawn with, the string being put to the union, with its weighted geometric mean, where no
member has put it forward.

Slow: each step is a round trip, and engines that keep no prompts read them again. It is for
combining models that share nothing but text; members with one tokenizer belong into one engine.
"""

from __future__ import annotations

import asyncio
import math
import random
from bisect import bisect_left
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from models.adapter import AdapterSource
from models.engines.base import (
    Chunk,
    FinishReason,
    GenerationRequest,
    SamplingOptions,
    Token,
    TopLogprob,
)
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
_NEXT = SamplingOptions(max_tokens=1, temperature=0, top_logprobs=_ALTERNATIVES)


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
    _check(task)
    prompts = [await task.prompt.tokens(tokenizer) for tokenizer in tokenizers]
    run.prompt_tokens = max(map(len, prompts))
    relative = answer.weights or (1.0,) * len(answer.members)
    run.weights = tuple(weight / sum(relative) for weight in relative)
    rng = random.Random(task.sampling.seed)
    stream = TextStream(task.sampling.stop, include_stop=task.sampling.include_stop)
    text, request_id = "", f"{task.request_id}:{run.path}"

    async def ask(
        tokens: Sequence[tuple[int, ...]], step: str, sampling: SamplingOptions
    ) -> list[Chunk]:
        """Return what every member says to its `tokens`."""
        return await asyncio.gather(
            *(
                client.complete(
                    GenerationRequest(
                        request_id=f"{request_id}:{step}-{name}",
                        prompt_tokens=read,
                        members=(name,),
                        sampling=sampling,
                        adapters={name: adapters[name]} if name in adapters else {},
                    )
                )
                for client, name, read in zip(clients, answer.members, tokens, strict=True)
            )
        )

    scored: tuple[Token, ...] = ()
    if task.sampling.prompt_logprobs is not None:
        told = await ask(prompts, "prompt", replace(_NEXT, prompt_logprobs=_ALTERNATIVES))
        scored = await asyncio.to_thread(
            score_strings,
            (task.prompt.plain_text or "").encode(),
            [one.prompt for one in told],
            tokenizers,
            run.weights,
            num_alternatives=task.sampling.prompt_logprobs,
            product=answer.rule == "product",
        )
    if scored or not max_tokens:
        end: FinishReason | None = None if max_tokens else "length"
        yield Chunk(text="", tokens=(), finish_reason=end, weights=run.weights, prompt=scored)
    if not max_tokens:
        return
    longest = context_tokens or math.inf
    for step in range(max_tokens):
        reads = [
            (*prompt, *tokenizer.encode(text, special=False))
            for prompt, tokenizer in zip(prompts, tokenizers, strict=True)
        ]
        if step and max(map(len, reads)) >= longest:
            # A string of one tokenizer may be many tokens of another, so this is known only now.
            yield Chunk(
                text=stream.finish(), tokens=(), finish_reason="length", weights=run.weights
            )
            return
        told = await ask(reads, str(step), _NEXT)
        opinions = [
            _opinion(one.tokens[0].top if one.tokens else (), tokenizer)
            for one, tokenizer in zip(told, tokenizers, strict=True)
        ]
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
        token = _token(piece, fused[piece], fused, task.sampling.top_logprobs or 0)
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
    return _normalised(_union(opinions, tokenizers, weights, product=product))


def score_strings(
    text: bytes,
    readings: Sequence[Sequence[Token]],
    tokenizers: Sequence[Tokenizer],
    weights: Sequence[float],
    *,
    num_alternatives: int,
    product: bool = False,
) -> tuple[Token, ...]:
    """Return `text` in strings that are whole tokens of every member, each as they are fused.

    `readings` are the members' own tokens of the text, which may begin with tokens that no text
    has. The first string has no log-probability where a member has none for it. Raises
    `RequestError` for a member that reads another text.
    """
    ends = [[*accumulate(len(token.raw) for token in tokens)] for tokens in readings]
    for index, (tokens, own) in enumerate(zip(readings, ends, strict=True)):
        if not b"".join(token.raw for token in tokens).endswith(text):
            raise RequestError("echo: a member reads the prompt as another text", "echo")
        ends[index] = [end - own[-1] + len(text) for end in own]
    # Not inside a character.
    whole = [p for p in range(1, len(text) + 1) if p == len(text) or text[p] & 0xC0 != 0x80]
    cuts = sorted(set(whole).intersection(*ends))
    strings_M: list[list[list[Token]]] = []
    for tokens, own in zip(readings, ends, strict=True):
        strings: list[list[Token]] = [[] for _ in cuts]
        for token, end in zip(tokens, own, strict=True):
            if end > 0:
                strings[bisect_left(cuts, end)].append(token)
        strings_M.append(strings)
    found = []
    for start, cut, *parts in zip([0, *cuts], cuts, *strings_M, strict=False):
        string, logprob = text[start:cut].decode(), None
        others: dict[str, float] = {}
        logs = [[token.logprob for token in part] for part in parts]
        if not any(None in one for one in logs):
            known = [math.fsum(log for log in one if log is not None) for one in logs]
            logprob = _fused(known, weights, product=product)
            if num_alternatives or product:
                opinions = [_opinion(p[0].top, t) for p, t in zip(parts, tokenizers, strict=True)]
                others = _union(opinions, tokenizers, weights, product=product)
            if product:
                others = _normalised({string: logprob, **others})
                logprob = others[string]
        found.append(_token(string, logprob, others, num_alternatives))
    return tuple(found)


def _token(text: str, logprob: float | None, others: Mapping[str, float], num_others: int) -> Token:
    """Return a string as a token, which is no one's and so has no id."""
    best = sorted(others, key=lambda other: -others[other])[:num_others]
    top = tuple(TopLogprob(token_id=0, raw=other.encode(), logprob=others[other]) for other in best)
    return Token(token_id=0, raw=text.encode(), logprob=logprob, top=top)


def _union(
    opinions: Sequence[Opinion],
    tokenizers: Sequence[Tokenizer],
    weights: Sequence[float],
    *,
    product: bool = False,
) -> dict[str, float]:
    """Return what the members together think of each string that one of them put forward."""
    union = dict.fromkeys(text for one in opinions for text in list(one.named)[:TOP])
    fused: dict[str, float] = {}
    for text in union:
        logs = [
            one.of(text, first_string(tokenizer, text))
            for one, tokenizer in zip(opinions, tokenizers, strict=True)
        ]
        fused[text] = _fused(logs, weights, product=product)
    return fused


def _normalised(fused: Mapping[str, float]) -> dict[str, float]:
    """Return log-probabilities whose probabilities sum to one."""
    highest = max(fused.values())
    total = highest + math.log(math.fsum(math.exp(v - highest) for v in fused.values()))
    return {text: value - total for text, value in fused.items()}


def _fused(logs: Sequence[float], weights: Sequence[float], *, product: bool) -> float:
    """Return the logarithm of the weighted mean of probabilities, their product's where wanted."""
    if product:
        return math.fsum(w * log for w, log in zip(weights, logs, strict=True))
    highest = max(logs)
    mean = math.fsum(w * math.exp(log - highest) for w, log in zip(weights, logs, strict=True))
    return highest + math.log(max(mean, 1e-300))


def first_string(tokenizer: Tokenizer, text: str) -> str:
    """Return the string of the first token of `text`."""
    ids = tokenizer.encode(text, special=False)
    return tokenizer.decode(ids[:1]) if ids else END


def _opinion(alternatives: Sequence[TopLogprob], tokenizer: Tokenizer) -> Opinion:
    """Return what a member thinks that named these `alternatives`."""
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


def _check(task: Task) -> None:
    """Refuse what speaks of token ids, or of a whole vocabulary."""
    sampling, prompt = task.sampling, task.prompt
    if prompt.token_ids is not None:
        raise RequestError(
            "prompt: token ids mean something else to each of members with different tokenizers; "
            "send the text",
            "prompt",
        )
    wanted = {
        "tools": prompt.tools is not None,
        "truncate_prompt_tokens": sampling.prompt_logprobs is not None and not prompt.plain_text,
        "logit_bias": bool(sampling.logit_bias),
        "response_format": sampling.structure is not None,
        "repetition_penalty": sampling.repetition_penalty != 1,
        "min_tokens": sampling.min_tokens > 0,
        "stop_token_ids": bool(sampling.stop_token_ids),
        "presence_penalty": sampling.presence_penalty != 0,
        "frequency_penalty": sampling.frequency_penalty != 0,
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
