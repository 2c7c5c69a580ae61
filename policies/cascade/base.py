"""The contract of a scorer: P(correct | query, answer), from what is free when the answer is in.

Scorers of a pool file go by kind: ours, and those of the entry point group `shoal.scorers`.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from policies.kinds import Plugins, Settings, read_spec
from policies.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One stage's answer and what came with it.

    `query` is the text a policy sees (`Query.text`); `plan` the stage that answered. Log
    probabilities are natural, of the tokens as generated; `num_tokens` counts them, the
    end-of-sequence token included. `entropy_mean` is the mean entropy, in nats, of the
    distributions that they were drawn from; None where the engine does not say. `earlier` holds the
    answers of the stages that ran before and were not accepted. `finished` is False while `answer`
    is a prefix.
    """

    query: str
    plan: Plan
    answer: str
    logprob_mean: float
    logprob_min: float
    num_tokens: int
    entropy_mean: float | None = None
    earlier: tuple[str, ...] = ()
    finished: bool = True


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a model made of a prompt before it answered, from its prefill alone.

    `logprob_mean` and `logprob_min` are natural, of the prompt's tokens but the first. `entropy` is
    the first answer token's, in nats, and `state_D` the last layer's hidden state at the prompt's
    end; None where the engine does not say.
    """

    logprob_mean: float
    logprob_min: float
    entropy: float | None = None
    state_D: NDArray[np.float32] | None = None


Readings: TypeAlias = Mapping[str, Mapping[str, Reading]]
"""By model and query."""


@runtime_checkable
class Scorer(Protocol):
    """Judges answers. Thread-safe, free of I/O and, unless it is a `BatchScorer`, fast."""

    def score(self, attempt: Attempt) -> float:
        """Return P(correct) in [0, 1]; never raises on any text."""
        ...


@runtime_checkable
class PrefixScorer(Protocol):
    """A scorer that can tell from the beginning of an answer how good it can still become."""

    def ceiling(self, prefix: Attempt, max_tokens: int) -> float:
        """Return an upper bound of `score` over the answers that go on from `prefix`.

        Whatever answers came before it, an answer of at most `max_tokens` tokens scores higher
        never, or as seldom as the scorer says. It never rises as the prefix grows.
        """
        ...


@runtime_checkable
class PromptScorer(Protocol):
    """A scorer that judges a stage of one model before its answer begins, by its reading."""

    def foresee(self, query: str, stage: Plan, reading: Reading | None) -> float:
        """Return P(`stage` will answer `query` well) in [0, 1]; never raises on any text.

        `reading` None: nothing is known of it.
        """
        ...


@runtime_checkable
class BatchScorer(Protocol):
    """A scorer that computes for many milliseconds: callers must keep it off the event loop."""

    def score_batch(self, attempts: Sequence[Attempt]) -> list[float]:
        """Return `Scorer.score` of every attempt, from one pass."""
        ...


@runtime_checkable
class Ranker(Protocol):
    """Compares answers to one query in pairs. Fast, thread-safe and free of I/O."""

    def rank(self, attempts: Sequence[Attempt]) -> list[float]:
        """Return the share of its pairs that each attempt is expected to win, in [0, 1]."""
        ...


class Confidence:
    """The geometric mean of the answer's token probabilities; needs no training."""

    def score(self, attempt: Attempt) -> float:
        """Return exp(mean log-probability), 0 for an empty answer."""
        return math.exp(min(attempt.logprob_mean, 0.0)) if attempt.num_tokens else 0.0

    def ceiling(self, prefix: Attempt, max_tokens: int) -> float:
        """Return exp(the log-probabilities' sum so far / `max_tokens`).

        No later token adds to the sum, and none but the first `max_tokens` share it.
        """
        total = min(prefix.logprob_mean, 0.0) * prefix.num_tokens
        return math.exp(total / max(max_tokens, prefix.num_tokens, 1))


# Full stops, marks and quotes of many scripts; NFKC has turned wide ones into these.
_CLOSING = ".!?,;:\"'` " + "\u3002\u3001\u0964\u061f\u06d4" + "“”‘’„«»「」『』"


def normalise(text: str) -> str:
    """Return `text` without what doesn't change an answer: case, spacing, closing punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).strip(_CLOSING)


S = TypeVar("S", bound=Settings)


@dataclass(frozen=True, kw_only=True)
class ScorerKind(Generic[S]):
    """What `kind: NAME` of a scorer stands for: the keys beside it, and what they build.

    `build` takes the folder where relative paths start, and raises `PolicyError`.
    """

    settings: type[S]
    build: Callable[[S, Path], Scorer]


KINDS: Plugins[ScorerKind[Any]] = Plugins(
    "shoal.scorers", ScorerKind, {"transformer": "policies.cascade.transformer:KIND"}
)


def build_scorer(spec: Mapping[str, Any], *, folder: Path) -> Scorer:
    """Build the scorer that `spec` describes: its `kind` and that kind's own keys.

    `folder` is where relative paths start. Raises `PolicyError` for an unknown kind, key or value.
    """
    kind, settings = read_spec(KINDS, spec)
    return kind.build(settings, folder)
