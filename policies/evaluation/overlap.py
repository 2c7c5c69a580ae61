"""Finds training queries that are also test queries, exactly or nearly."""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

NUM_SHINGLE_WORDS = 4
LIKENESS = 0.8


def near_duplicates(train: Sequence[str], test: Sequence[str]) -> list[int]:
    """Return the rows of `train` that (nearly) repeat a query of `test`.

    Queries are near-duplicates if the Jaccard similarity of their sets of four-word shingles
    (upper and lower case, punctuation and white space ignored) is at least 0.8. Candidates come
    from prefix filtering (Chaudhuri, Ganti & Kaushik 2006): with all sets in one order, rarest
    shingle first, two such sets share a shingle among the first n - ⌈0.8·n⌉ + 1 of each. Exact.
    """
    train_sets = [_shingles(text) for text in train]
    test_sets = [_shingles(text) for text in test]
    frequency = Counter(shingle for shingles in (*train_sets, *test_sets) for shingle in shingles)
    where: dict[int, list[int]] = defaultdict(list)
    for row, shingles in enumerate(train_sets):
        for shingle in _prefix(shingles, frequency):
            where[shingle].append(row)
    found: set[int] = set()
    for shingles in test_sets:
        rows = {row for shingle in _prefix(shingles, frequency) for row in where.get(shingle, ())}
        found |= {row for row in rows - found if _likeness(shingles, train_sets[row]) >= LIKENESS}
    return sorted(found)


def _prefix(shingles: frozenset[int], frequency: Mapping[int, int]) -> list[int]:
    num_shingles = len(shingles)
    length = num_shingles - math.ceil(LIKENESS * num_shingles) + 1
    return sorted(shingles, key=lambda shingle: (frequency[shingle], shingle))[:length]


def _shingles(text: str) -> frozenset[int]:
    words = re.findall(r"\w+", text.lower())
    last = max(1, len(words) - NUM_SHINGLE_WORDS + 1)
    return frozenset(
        zlib.crc32(" ".join(words[i : i + NUM_SHINGLE_WORDS]).encode("utf-8", "replace"))
        for i in range(last)
    )


def _likeness(one: frozenset[int], other: frozenset[int]) -> float:
    if min(len(one), len(other)) < LIKENESS * max(len(one), len(other)):
        return 0.0  # too different in size to be worth intersecting
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)
