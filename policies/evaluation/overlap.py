"""Finds queries that repeat others, exactly or nearly, so that no test query is trained on."""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

NUM_SHINGLE_WORDS = 4
LIKENESS = 0.8


def near_duplicates(texts: Sequence[str]) -> dict[int, set[int]]:
    """Return, for every row of `texts` that (nearly) repeats others, the rows of those.

    Queries are near-duplicates if the Jaccard similarity of their sets of four-word shingles
    (upper and lower case, punctuation and white space ignored) is at least 0.8. Candidates come
    from prefix filtering (Chaudhuri, Ganti & Kaushik 2006): with all sets in one order, rarest
    shingle first, two such sets share a shingle among the first n - ⌈0.8·n⌉ + 1 of each. Exact.
    """
    sets = [_shingles(text) for text in texts]
    frequency = Counter(shingle for shingles in sets for shingle in shingles)
    earlier: dict[int, list[int]] = defaultdict(list)
    alike: dict[int, set[int]] = defaultdict(set)
    for row, shingles in enumerate(sets):
        prefix = _prefix(shingles, frequency)
        for other in {other for shingle in prefix for other in earlier[shingle]}:
            if _likeness(shingles, sets[other]) >= LIKENESS:
                alike[row].add(other)
                alike[other].add(row)
        for shingle in prefix:
            earlier[shingle].append(row)
    return dict(alike)


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
