"""One request while it is in the engine: its lanes, tokens, cache rows, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from models.engines.base import Chunk, FinishReason, GenerationRequest, Token, TopLogprob
from models.engines.stacked.fusion import Fusion, LaneWeights
from models.engines.stacked.sampler import Draw, SamplerState, Scored
from models.engines.text import TextStream, Vocabulary
from models.errors import EngineError, RequestError

Outcome = Chunk | EngineError | RequestError
"""What a reader receives: chunks, the last with a finish reason; or one error."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a lead says of a token to come: log-probabilities, [V], and whether it is sure.

    One that runs ahead has drawn a token to go on with, whose log-probability it gives as well.
    """

    logp_V: Tensor
    is_sure: bool
    logprob: float = 0.0


@dataclass(kw_only=True, eq=False, slots=True)
class Sequence:
    """The engine's state of one request; only the engine's thread changes it.

    `members` are indices, ascending, without those that do not count; `weights` are theirs.
    `lane_of` says for each member that the request names which lane it is, None if it has none.
    With `lead_alone` the lead comes before all others, and the others follow only where they are
    asked (see `lead`): theirs are the first `num_followed` tokens, and `said` is what waits for
    what they say. A lead of another shape is no lane but a sequence of its own, the `scout`, and a
    scout's `follows` is who it leads; the others run once the lead `asks`. `num_asked` counts the
    tokens at which they had a say.
    `end_tokens` end an answer of any of its members. `tokens` is the prompt and what was generated
    so far, of which the first `num_cached` have their keys and values in the cache, from row
    `region_start` on (None while it waits); the first `num_reused` were copied from another
    request's (None until its prompt has begun). `scored` is what the members said of the prompt in
    the last step, where that was asked for, `state_KD` what their last layers made of its end, and
    a scout's `prompt_TD` what its last layer made of the whole.
    `send` hands an outcome to the reader, on the event loop; what `accept` collects is for its next
    one.
    """

    request: GenerationRequest
    members: tuple[int, ...]
    weights: LaneWeights
    lane_of: tuple[int | None, ...]
    end_tokens: frozenset[int]
    tokens: list[int]
    max_new_tokens: int
    sampler: SamplerState
    text: TextStream
    send: Callable[[Outcome], None]
    lead_alone: bool = False
    scout: Sequence | None = None
    follows: Sequence | None = None
    said: list[Said] = field(default_factory=list)
    asks: bool = False
    num_asked: int = 0
    num_cached: int = 0
    num_followed: int = 0
    num_reused: int | None = None
    region_start: int | None = None
    finished: bool = False
    scored: Scored | None = None
    state_KD: NDArray[np.float32] | None = None
    prompt_TD: Tensor | None = None
    _new_tokens: list[Token] = field(default_factory=list)
    _prompt: list[Token] = field(default_factory=list)
    _new_text: str = ""
    _finish_reason: FinishReason | None = None
    _stop: str | int | None = None

    @property
    def fusion(self) -> Fusion:
        """How the next token's distributions are fused."""
        request = self.request
        if self.lead_alone and not self.said:
            return Fusion("mixture", (1.0,))
        return Fusion(request.rule, self.weights.values, self.lane_of[0] or 0, request.gate)

    @property
    def num_lanes(self) -> int:
        """How many members run."""
        return len(self.members)

    @property
    def capacity_tokens(self) -> int:
        """Cache rows per lane; the last token generated is never fed back."""
        return len(self.request.prompt_tokens) + self.max_new_tokens - 1

    @property
    def num_rows(self) -> int:
        """Cache rows of all lanes."""
        return self.num_lanes * self.capacity_tokens

    @property
    def num_generated(self) -> int:
        """Tokens drawn so far."""
        return len(self.tokens) - len(self.request.prompt_tokens)

    @property
    def reads_prompt(self) -> bool:
        """Whether what the members say of the prompt is asked for, so that all must compute it."""
        return self.weights.evidence is not None or self.sampler.options.prompt_logprobs is not None

    @property
    def others_due(self) -> bool:
        """Whether those run next whom a lead that ran alone has asked."""
        return self.lead_alone and bool(self.said)

    @property
    def due(self) -> range:
        """The lanes that run next: all; where the lead runs alone it, or the others once asked."""
        if not self.lead_alone:
            return range(self.num_lanes)
        return range(1, self.num_lanes) if self.said else range(1)

    def num_cached_of(self, lane: int) -> int:
        """Return how many tokens have their keys and values in the cache."""
        return self.num_followed if self.lead_alone and lane else self.num_cached

    @property
    def num_pending(self) -> int:
        """Tokens that must still go through what is due: 1 while decoding, more before."""
        return len(self.tokens) - (self.num_followed if self.others_due else self.num_cached)

    @property
    def draft(self) -> tuple[int, ...]:
        """What those whom a scout asks must read of its guesses to check them all: not the last."""
        return () if self.scout is None else tuple(self.scout.tokens[len(self.tokens) : -1])

    @property
    def may_run(self) -> bool:
        """Whether its own lanes have something to do, rather than a scout."""
        return self.scout is None or self.asks

    def alone(self, member: int) -> Sequence:
        """Return the same for one `member` of a runner, on rows of its own: nothing has run yet."""
        return replace(
            self,
            members=(member,),
            weights=LaneWeights((1.0,)),
            lane_of=(0,),
            tokens=list(self.tokens),
            said=[],
            num_cached=0,
            num_reused=None,
            region_start=None,
        )

    def follow(self, text: Sequence) -> None:
        """Bring a lane of its own to the tokens of the sequence for which it guesses.

        What it has run of earlier guesses stands as far as those were right.
        """
        self.num_cached = min(self.num_cached, len(text.tokens) - 1)
        while self.tokens[: self.num_cached] != text.tokens[: self.num_cached]:
            self.num_cached -= 1
        self.tokens[:] = text.tokens
        self.sampler = text.sampler

    def keep_prompt(self, hidden_TD: Tensor) -> None:
        """Keep what the last layer made of the prompt's tokens after the first `num_cached`."""
        if self.prompt_TD is None:
            num_tokens = len(self.request.prompt_tokens)
            self.prompt_TD = hidden_TD.new_empty(num_tokens, hidden_TD.shape[-1])
        self.prompt_TD[self.num_cached : self.num_cached + len(hidden_TD)] = hidden_TD

    def advance(self, num_tokens: int) -> None:
        """Note that so many more tokens have gone through what was due."""
        if self.others_due:
            self.num_followed += num_tokens
        else:
            self.num_cached += num_tokens

    def accept(self, drawn: Draw, row: int, *, vocabulary: Vocabulary) -> None:
        """Take the token drawn in `row`; `take` tells the reader."""
        token = drawn.token_ids[row]
        options = self.sampler.options
        self.tokens.append(token)
        self.said.clear()
        self.asks = False
        complete = self.sampler.accept(token)
        if options.prompt_logprobs is not None and self.num_generated == 1:
            self._prompt.insert(0, _prompt_token(self.tokens[0], None, (), vocabulary))
        ends = token in self.end_tokens and not options.ignore_eos
        stops = token in options.stop_token_ids
        hidden = ends or (stops and not options.include_stop)
        raw = b"" if hidden else vocabulary.raw(token)
        self._new_text += self.text.push(raw)
        if ends or stops or complete or self.text.stopped:
            self._stop = self.text.stop or (token if stops else None)
            self._finish("stop")
        elif self.num_generated == self.max_new_tokens:
            self._finish("length")
        self._new_tokens.append(
            Token(
                token_id=token,
                raw=raw,
                logprob=drawn.logprobs[row],
                top=_alternatives(drawn.top[row], vocabulary),
                # Rounding can leave a sure distribution a little below none.
                entropy=max(drawn.entropies[row], 0.0),
            )
        )

    def score(self, *, vocabulary: Vocabulary) -> None:
        """Take what the last step has `scored`, if anything."""
        scored, self.scored = self.scored, None
        if scored is None:
            return
        told = zip(scored.logprobs, scored.top, strict=True)
        for token, (logprob, top) in zip(self.tokens[len(self._prompt) + 1 :], told, strict=False):
            self._prompt.append(_prompt_token(token, logprob, top, vocabulary))

    def take(self) -> Chunk:
        """Return what was accepted since the last call."""
        chunk = Chunk(
            text=self._new_text,
            tokens=tuple(self._new_tokens),
            finish_reason=self._finish_reason,
            stop=self._stop,
            weights=self._named_weights() if self.finished and len(self.lane_of) > 1 else None,
            cached_tokens=((self.scout or self).num_reused or 0) if self.finished else None,
            followed=self._followed() if self.finished else None,
            prompt=tuple(self._prompt),
            rows=self.state_KD,
        )
        self.state_KD = None
        self._new_text = ""
        self._new_tokens.clear()
        self._prompt.clear()
        return chunk

    def _finish(self, reason: FinishReason) -> None:
        self.finished = True
        self._finish_reason = reason
        if not self.text.stopped:
            self._new_text += self.text.finish()

    def _followed(self) -> tuple[int, int] | None:
        """Return how many tokens those who follow a lead have read and written; None: nobody does.

        Who writes a token need not read it again but for the next one, as everywhere.
        """
        if not self.lead_alone and self.scout is None:
            return None
        num_computed = self.num_followed if self.lead_alone else self.num_cached
        return num_computed - self.num_asked + bool(self.num_asked), self.num_asked

    def _named_weights(self) -> tuple[float, ...]:
        values = self.weights.values
        return tuple(0.0 if lane is None else values[lane] for lane in self.lane_of)


def _prompt_token(
    token: int, logprob: float | None, top: Iterable[tuple[int, float]], vocabulary: Vocabulary
) -> Token:
    return Token(
        token_id=token,
        raw=vocabulary.raw(token),
        logprob=logprob,
        top=_alternatives(top, vocabulary),
    )


def _alternatives(
    top: Iterable[tuple[int, float]], vocabulary: Vocabulary
) -> tuple[TopLogprob, ...]:
    return tuple(
        TopLogprob(token_id=token, raw=vocabulary.raw(token), logprob=logprob)
        for token, logprob in top
    )
