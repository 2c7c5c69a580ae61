"""Finds training queries that are also test queries, exactly or nearly."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Sequence

NUM_SHINGLE_WORDS = 4
LIKENESS = 0.8


def near_duplicates(train: Sequence[str], test: Sequence[str]) -> list[int]:
    """Return the rows of `train` that (nearly) repeat a query of `test`.

    Queries are near-duplicates if the Jaccard similarity of their sets of four-word shingles
    (upper and lower case, punctuation and white space ignored) is at least 0.8; the four rarest
    shingles of each test query find the candidates.
    """
    train_sets = [_shingles(text) for text in train]
    where: dict[int, list[int]] = defaultdict(list)
    for row, shingles in enumerate(train_sets):
        for shingle in shingles:
            where[shingle].append(row)
    found: set[int] = set()
    for text in test:
        shingles = _shingles(text)
        # If 80% of the shingles are shared, the four rarest that occur at all include a shared one
        # unless all four are among the other 20%; half of the shingles leaves no such case.
        rarest = sorted(shingles, key=lambda shingle: len(where.get(shingle, ())))
        for shingle in rarest[: max(4, len(rarest) // 2)]:
            for row in where.get(shingle, ()):
                if row not in found and _likeness(shingles, train_sets[row]) >= LIKENESS:
                    found.add(row)
    return sorted(found)


def _shingles(text: str) -> frozenset[int]:
    words = re.findall(r"\w+", text.lower())
    last = max(1, len(words) - NUM_SHINGLE_WORDS + 1)
    return frozenset(
        zlib.crc32(" ".join(words[i : i + NUM_SHINGLE_WORDS]).encode("utf-8", "replace"))
        for i in range(last)
    )


def _likeness(one: frozenset[int], other: frozenset[int]) -> float:
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)
