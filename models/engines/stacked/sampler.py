"""Drawing each request's next token from its fused distribution.

Shapes: R requests, V vocabulary, C candidates (the likeliest tokens, best first).

Everything is per row, so a request's draw depends on nothing else in the batch: with a seed, one
uniform number per token from the request's own generator picks from the cumulative distribution.
Filters apply in the order of transformers' `generate`: grammar, bias and penalties, temperature,
top_k, top_p, min_p.
"""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq
from copy import copy
from dataclasses import dataclass

import numpy as np
import torch
from llguidance import LLMatcher
from torch import Tensor

from models.engines.base import SamplingOptions

# How many of the likeliest tokens are sorted at first; all are where these don't suffice.
_NUM_CANDIDATES = 256
# Below this a temperature means greedy: dividing by it would overflow.
_MIN_TEMPERATURE = 1e-5


class Grammar:
    """The state of an answer that must follow a grammar: which tokens may come next."""

    def __init__(self, matcher: LLMatcher) -> None:
        """Start an answer; see `models.engines.answer_grammar`."""
        self._matcher = matcher

    def allowed(self, vocab_size: int) -> Tensor:
        """Return which tokens may come next, [V], bool."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[:vocab_size]
        return torch.from_numpy(allowed).bool()

    def num_allowed(self, tokens: Seq[int]) -> int:
        """Return how many of `tokens` may come next, one after the other."""
        return int(self._matcher.validate_tokens(list(tokens)))

    def after(self, tokens: Seq[int]) -> Grammar:
        """Return the state once `tokens` were taken, all of them allowed; this one stays."""
        matcher = self._matcher.deep_copy()
        matcher.consume_tokens(list(tokens))
        return Grammar(matcher)

    def accept(self, token: int) -> bool:
        """Take the next token; return whether the answer is complete and cannot go on."""
        self._matcher.consume_token(token)
        return bool(self._matcher.is_stopped())


class SamplerState:
    """What one request's sampling remembers between tokens."""

    def __init__(
        self,
        options: SamplingOptions,
        grammar: Grammar | None,
        rng: random.Random,
        *,
        prompt: Seq[int] = (),
        ends: Seq[int] = (),
    ) -> None:
        """`prompt` counts for the repetition penalty; `ends` are not drawn before `min_tokens`."""
        self.options = options
        self.grammar = grammar
        self.rng = rng
        self._ends = list(ends) if options.min_tokens else []
        self._uniforms: list[float] = []  # of the next token and those after it
        self._num_ahead = 0
        self._edits_V: Tensor | None = None
        self._repeated_V: Tensor | None = None
        self._seen: set[int] = set()
        self._repeated = set(prompt) if options.repetition_penalty != 1 else None
        self._num_accepted = 0

    def uniform(self) -> float:
        """Return the number in [0, 1) that picks the next token, the same until one is accepted.

        So a step that failed can be run again.
        """
        while len(self._uniforms) <= self._num_ahead:
            self._uniforms.append(self.rng.random())
        return self._uniforms[self._num_ahead]

    def after(self, tokens: Seq[int]) -> SamplerState:
        """Return what this will be once `tokens` were accepted; this one stays as it is.

        A grammar must allow them. The same numbers pick the tokens that come then.
        """
        if not tokens:
            return self
        ahead = copy(self)
        ahead._num_ahead += len(tokens)
        ahead._num_accepted += len(tokens)
        if self.grammar is not None:
            ahead.grammar = self.grammar.after(tokens)
        if self._edits_V is not None:
            ahead._edits_V, ahead._seen = self._edits_V.clone(), set(self._seen)
        if self._repeated_V is not None:
            ahead._repeated_V = self._repeated_V.clone()
        for token in tokens:
            ahead._penalize(token)
        return ahead

    @property
    def edits(self) -> bool:
        """Whether `edit` changes anything."""
        options = self.options
        return bool(
            self.grammar
            or options.logit_bias
            or options.presence_penalty
            or options.frequency_penalty
            or self._repeated is not None
            or self._num_accepted < options.min_tokens
        )

    def edit(self, logp_V: Tensor) -> None:
        """Apply penalties, bias, `min_tokens` and grammar in place."""
        if self._edits_V is None:
            self._edits_V = torch.zeros_like(logp_V)
            for token, bias in self.options.logit_bias.items():
                self._edits_V[token] = bias
        if self._repeated is not None:
            if self._repeated_V is None:
                self._repeated_V = torch.ones_like(logp_V)
                self._repeated_V[list(self._repeated)] = self.options.repetition_penalty
            # Log-probabilities are never positive: all are multiplied.
            logp_V *= self._repeated_V
        logp_V += self._edits_V
        if self._num_accepted < self.options.min_tokens:
            logp_V[self._ends] = float("-inf")
        if self.grammar is not None:
            allowed_V = self.grammar.allowed(len(logp_V)).to(logp_V.device)
            logp_V.masked_fill_(~allowed_V, float("-inf"))

    def accept(self, token: int) -> bool:
        """Note that `token` was drawn; return whether a grammar says that the answer is over."""
        del self._uniforms[:1]
        self._num_accepted += 1
        self._penalize(token)
        return self.grammar is not None and self.grammar.accept(token)

    def _penalize(self, token: int) -> None:
        if self._repeated_V is not None:
            self._repeated_V[token] = self.options.repetition_penalty
        if self._edits_V is not None:
            first = token not in self._seen
            self._seen.add(token)
            self._edits_V[token] -= self.options.frequency_penalty + (
                self.options.presence_penalty if first else 0.0
            )


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The drawn tokens, and what is known before any filter.

    That is their log-probabilities, the entropy in nats of the distributions that they were drawn
    from, and the likeliest alternatives. The entropy of a row that is not finite is not, either.
    """

    tokens_R: Tensor
    token_ids: list[int]
    logprobs: list[float]
    entropies: list[float]
    top: list[list[tuple[int, float]]]  # best first; empty where not asked for


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What is known of tokens that stand already: their log-probabilities, and the likeliest."""

    logprobs: list[float]
    top: list[list[tuple[int, float]]]  # best first


def score(logp_TV: Tensor, targets: Seq[int], num_top: int) -> Scored:
    """Return what the distributions say of `targets`, and their `num_top` likeliest tokens."""
    ids_T = torch.tensor(targets, device=logp_TV.device)
    logprobs_T = logp_TV.gather(1, ids_T[:, None]).squeeze(1)
    return Scored(logprobs=logprobs_T.tolist(), top=_top(logp_TV, [num_top] * len(targets)))


def draw(logp_RV: Tensor, states: Seq[SamplerState]) -> Draw:
    """Draw one token per request from log-probabilities; see the module's docstring."""
    scores_RV = logp_RV
    if any(state.edits for state in states):
        scores_RV = logp_RV.clone()
        for row, state in enumerate(states):
            if state.edits:
                state.edit(scores_RV[row])
    warm = [
        row for row, state in enumerate(states) if state.options.temperature >= _MIN_TEMPERATURE
    ]
    if len(warm) == len(states):
        tokens_R = _sample(scores_RV, states)
    else:
        logprobs_R, tokens_R = scores_RV.max(-1)
        if warm:
            tokens_R[warm] = _sample(scores_RV[warm], [states[row] for row in warm])
    if warm or scores_RV is not logp_RV:
        logprobs_R = logp_RV.gather(1, tokens_R[:, None]).squeeze(1)
    entropies_R = -torch.linalg.vecdot(logp_RV.exp(), logp_RV)
    # One transfer from the device for both.
    logprobs, entropies = torch.stack([logprobs_R, entropies_R]).tolist()
    return Draw(
        tokens_R=tokens_R,
        token_ids=tokens_R.tolist(),
        logprobs=logprobs,
        entropies=entropies,
        top=_top(logp_RV, [state.options.top_logprobs or 0 for state in states]),
    )


def _sample(scores_RV: Tensor, states: Seq[SamplerState]) -> Tensor:
    """Draw by temperature and filters; [R]."""
    options = [state.options for state in states]
    temperatures = [option.temperature for option in options]
    if any(temperature != 1 for temperature in temperatures):
        scores_RV = scores_RV / scores_RV.new_tensor(temperatures)[:, None]
    uniform_R = torch.tensor(
        [state.uniform() for state in states], dtype=torch.float64, device=scores_RV.device
    )
    probs_RV = scores_RV.softmax(-1)
    filtered = [row for row, option in enumerate(options) if _filters(option)]
    if not filtered:
        return _invert(probs_RV, uniform_R)
    if len(filtered) == len(states):
        return _sample_filtered(probs_RV, options, uniform_R)
    tokens_R = _invert(probs_RV, uniform_R)
    tokens_R[filtered] = _sample_filtered(
        probs_RV[filtered], [options[row] for row in filtered], uniform_R[filtered]
    )
    return tokens_R


def _filters(options: SamplingOptions) -> bool:
    return options.top_k is not None or options.top_p < 1 or bool(options.min_p)


def _sample_filtered(probs_RV: Tensor, options: Seq[SamplingOptions], uniform_R: Tensor) -> Tensor:
    vocab_size = probs_RV.shape[-1]
    top_k_R1 = probs_RV.new_tensor(
        [min(option.top_k or vocab_size, vocab_size) for option in options]
    )[:, None]
    top_p_R1 = probs_RV.new_tensor([option.top_p for option in options])[:, None]
    min_p_R1 = probs_RV.new_tensor([option.min_p or 0.0 for option in options])[:, None]

    most = max(option.top_k or 0 for option in options)
    num_candidates = min(max(most, _NUM_CANDIDATES), vocab_size)
    while True:
        probs_RC, tokens_RC = probs_RV.topk(num_candidates)
        ranks_C = torch.arange(num_candidates, device=probs_RV.device)
        kept_RC = ranks_C < top_k_R1
        mass_RC = (probs_RC * kept_RC).cumsum(-1)
        # What top_k keeps is renormalised before top_p; without top_k the whole has mass 1.
        total_R1 = torch.where(top_k_R1 < vocab_size, mass_RC[:, -1:], 1.0)
        kept_RC &= mass_RC - probs_RC < top_p_R1 * total_R1
        kept_RC &= probs_RC >= min_p_R1 * probs_RC[:, :1]
        kept_RC[:, 0] = True
        cut_short = bool((kept_RC[:, -1:] & (top_k_R1 > num_candidates)).any())
        if not cut_short:
            picked_R = _invert(probs_RC * kept_RC, uniform_R)
            return tokens_RC.gather(1, picked_R[:, None]).squeeze(1)
        num_candidates = vocab_size


def _invert(weights_RC: Tensor, uniform_R: Tensor) -> Tensor:
    """Return where the cumulative sum of `weights_RC` passes `uniform_R` of its total; [R].

    Of a row that is not finite, any place within it.
    """
    cumulative_RC = weights_RC.cumsum(-1, dtype=torch.float64)
    targets_R1 = (uniform_R * cumulative_RC[:, -1])[:, None]
    found_R = torch.searchsorted(cumulative_RC, targets_R1, right=True).squeeze(1)
    return found_R.clamp_(max=weights_RC.shape[-1] - 1)


def _top(logp_RV: Tensor, counts: Seq[int]) -> list[list[tuple[int, float]]]:
    most = max(counts)
    if most == 0:
        return [[] for _ in counts]
    logp_RC, tokens_RC = logp_RV.topk(min(most, logp_RV.shape[-1]))
    return [
        list(zip(tokens[:count], logprobs[:count], strict=True))
        for tokens, logprobs, count in zip(
            tokens_RC.tolist(), logp_RC.tolist(), counts, strict=True
        )
    ]
