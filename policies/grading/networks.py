"""Graders that compute: a sentence encoder's likeness to a reference, a reward model's opinion.

One question computes at a time. Each is tried once before there is any, so that weights which
cannot be used are known before a pool has answered for an hour.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from policies.cascade.base import Attempt
from policies.cascade.transformer import Transformer
from policies.encoders.transformer import SentenceVectors
from policies.errors import PolicyError
from policies.files import content_sha256
from policies.grading.base import Graded, GraderKind, GradingContext, Question, Ungradable
from policies.plan import Answer

_MOST_TOKENS = 512

T = TypeVar("T")


class Similarity:
    """The cosine between the vectors of an answer and its likest reference, at least 0."""

    def __init__(self, vectors: SentenceVectors, basis: str = "") -> None:
        self._vectors = vectors
        self.basis = basis

    async def grade(self, question: Question, answers: Mapping[str, str]) -> Graded:
        """Return each answer's likeness; raises `Ungradable` without a reference."""
        right = question.right()
        texts = [*right, *answers.values()]
        vectors_ND = await asyncio.to_thread(self._vectors, texts)
        cosines_AR = vectors_ND[len(right) :] @ vectors_ND[: len(right)].T
        best_A = np.clip(cosines_AR.max(axis=1), 0, 1).tolist()
        return Graded(scores=dict(zip(answers, best_A, strict=True)))


class Reward:
    """A reward model's logits of (question, answer), raw, and as a softmax over the models.

    ZOOTER learns from such a softmax (Lu et al. 2023, eq. 3). With one answer it is the sigmoid.
    """

    def __init__(self, classifier: Transformer, basis: str = "") -> None:
        self._classifier = classifier
        self.basis = basis

    async def grade(self, question: Question, answers: Mapping[str, str]) -> Graded:
        """Return each answer's share of the softmax, and its logit."""
        attempts = _attempts(question.query, answers)
        logits = await asyncio.to_thread(self._classifier.logits, attempts)
        if not all(map(math.isfinite, logits)):
            raise Ungradable("the reward model's logits are not finite")
        raw = dict(zip(answers, logits, strict=True))
        if len(logits) == 1:
            return Graded(scores={n: 0.5 * (1 + math.tanh(x / 2)) for n, x in raw.items()}, raw=raw)
        odds = np.exp(np.array(logits) - max(logits))
        shares = (odds / odds.sum()).tolist()
        return Graded(scores=dict(zip(answers, shares, strict=True)), raw=raw)


def _attempts(query: str, answers: Mapping[str, str]) -> list[Attempt]:
    return [
        Attempt(
            query=query,
            plan=Answer(members=(name,)),
            answer=text,
            logprob_mean=0.0,
            logprob_min=0.0,
            num_tokens=0,
        )
        for name, text in answers.items()
    ]


def _build_similarity(argument: str, context: GradingContext) -> Similarity:
    if not argument:
        raise PolicyError("grade: similarity needs an encoder, as in similarity:hf:ORG/NAME")
    folder = context.locate(argument)

    def load() -> SentenceVectors:
        vectors = SentenceVectors(folder, max_tokens=_MOST_TOKENS)
        vectors(["?"])
        return vectors

    vectors, basis = _tried(f"similarity:{argument}", folder, load)
    return Similarity(vectors, basis)


def _build_reward(argument: str, context: GradingContext) -> Reward:
    if not argument:
        raise PolicyError("grade: reward needs a sequence classifier, as in reward:hf:ORG/NAME")
    folder = context.locate(argument)

    def load() -> Transformer:
        classifier = Transformer(folder, max_tokens=_MOST_TOKENS)
        classifier.logits(_attempts("?", {"one": "!"}))
        return classifier

    classifier, basis = _tried(f"reward:{argument}", folder, load)
    return Reward(classifier, basis)


def _tried(spec: str, folder: Path, load: Callable[[], T]) -> tuple[T, str]:
    """Return what is loaded from `folder`, and what tells it from what may stand there later."""
    try:
        return load(), content_sha256(folder) or ""
    except Exception as error:  # whatever a checkpoint's files lead to
        told = error if isinstance(error, PolicyError) else f"{type(error).__name__}: {error}"
        raise PolicyError(f"grade: {spec} cannot be used: {told}") from None


SIMILARITY = GraderKind(_build_similarity)
REWARD = GraderKind(_build_reward)
