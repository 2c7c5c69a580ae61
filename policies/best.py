"""Which of several answers to one query is taken: what a `Best` selects by, served or played."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from policies.cascade.base import Attempt, BatchScorer, Ranker, Scorer, normalise
from policies.plan import Best


def rate(best: Best, attempts: Sequence[Attempt], scorers: Mapping[str, Scorer]) -> list[float]:
    """Return the score of each attempt; the highest is taken, of equal ones the first.

    By majority it is the share of those that say the same. Slow where `best.scorer` is.
    """
    if best.select == "majority":
        votes = [normalise(one.answer) for one in attempts]
        counts = Counter(votes)
        return [counts[vote] / len(votes) for vote in votes]
    scorer = scorers["confidence" if best.select == "confidence" else best.scorer]
    if best.select == "ranker":
        assert isinstance(scorer, Ranker), "the plan has been checked"
        return scorer.rank(attempts)
    # Each candidate's support is the others' answers.
    others = [tuple(other.answer for other in attempts if other is not one) for one in attempts]
    supported = [replace(one, earlier=told) for one, told in zip(attempts, others, strict=True)]
    if isinstance(scorer, BatchScorer):
        return scorer.score_batch(supported)
    return [scorer.score(one) for one in supported]
