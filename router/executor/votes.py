"""Votes among answers: which texts count as the same, and when a vote is decided."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def majority(votes: Sequence[str | None]) -> int | None:
    """Return the index of the first vote for the most frequent text; None if nobody voted.

    A candidate without an answer votes None. On a tie the text that an earlier candidate gave
    wins.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return None
    most = max(counts.values())
    return next(
        index for index, vote in enumerate(votes) if vote is not None and counts[vote] == most
    )


def decided(votes: Sequence[str], num_open: int) -> bool:
    """Return whether `num_open` further votes cannot change the winner of `votes`.

    They cannot if the leader stays ahead of the second even when all of them go to it.
    """
    ranked = Counter(votes).most_common(2)
    if not ranked:
        return False
    second = ranked[1][1] if len(ranked) > 1 else 0
    return ranked[0][1] > second + num_open
