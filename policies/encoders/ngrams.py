"""Hashed word and character n-grams: no download, NumPy only, tens of microseconds per query.

It does not know meaning: two queries are alike when they share n-grams. `hashing` finds them, this
weighs them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.utils.extmath import randomized_svd

from policies.encoders.base import Arrays, Encoded, Features, Floats, Ids, Reader, Reading
from policies.encoders.hashing import MAX_BYTES, Hasher, clip
from policies.encoders.tables import side_by_side
from policies.errors import PolicyError

BASIS_QUERIES: Final = 4096
"""So many training queries, at most, show in which directions queries differ most."""

_SUBLINEAR: Final = np.log(np.arange(MAX_BYTES + 1).clip(1), dtype=np.float32) + np.float32(1)
"""1 + ln(count), by count: no n-gram occurs more often than a query has bytes."""


class NGrams:
    """Hashed n-grams: words and word pairs in one block, windows of characters in another.

    Each block has 2^`bits` features, weighted (1 + ln count)·idf and scaled to norm 1 (Salton's
    sublinear tf-idf). Queries beyond `MAX_BYTES` bytes keep their first and last halves of that,
    where instructions and questions stand. N-grams that fewer than two training queries had are
    worth nothing to the heads, but count in the norm: a query made of unknown n-grams is all but
    empty, and is known to be. (Two, so that a training query looks as it would if it were new.)
    The point is the projection on the first `num_dimensions` singular vectors (latent
    semantic analysis, Deerwester et al. 1990) of a sample of the training queries, kept in half
    precision.
    """

    kind = "ngrams"

    def __init__(
        self, *, bits: int = 16, window: int = 4, num_dimensions: int = 64, seed: int = 0
    ) -> None:
        if not 8 <= bits <= 22:
            raise PolicyError(f"ngrams.bits: {bits} is not in [8, 22]")
        if not 2 <= window <= 8:
            raise PolicyError(f"ngrams.window: {window} is not in [2, 8]")
        if num_dimensions < 1:
            raise PolicyError(f"ngrams.num_dimensions: {num_dimensions} is not at least 1")
        self.bits = bits
        self.window = window
        self.num_dimensions = num_dimensions
        self.seed = seed
        self._hash = Hasher(bits=bits, window=window)
        self._first_id_of_windows = np.int32(1 << bits)
        self.known_ = np.empty(0, np.int64)
        self.idf_ = np.ones(self.num_features, np.float32)
        self.basis_ = np.empty((0, num_dimensions), np.float16)  # of the known features

    @property
    def num_features(self) -> int:
        """Two blocks of 2^bits."""
        return 2 << self.bits

    def fit(self, texts: Sequence[str]) -> Self:
        """Learn idf weights and the basis of the points."""
        counts = self._counts(texts)
        df = np.bincount(counts.indices, minlength=self.num_features)
        self.idf_ = (np.log((1 + len(texts)) / (1 + np.maximum(df, 1))) + 1).astype(np.float32)
        self.known_ = np.flatnonzero(df >= 2)
        sample = np.random.default_rng(self.seed).permutation(len(texts))[:BASIS_QUERIES]
        matrix = self._weigh(counts[np.sort(sample)])[:, self.known_]
        rank = min(self.num_dimensions, min(matrix.shape) - 1)
        self.basis_ = np.zeros((len(self.known_), self.num_dimensions), np.float16)
        if rank > 0:
            # Two power iterations are enough for clustering.
            _, _, vectors = randomized_svd(matrix, rank, n_iter=2, random_state=self.seed)
            self.basis_[:, :rank] = vectors.T
        return self

    def features(self, text: str) -> Features:
        """Return the weighted n-grams of one query."""
        ids, counts = self._count(text)
        return Features(ids, self._weigh_one(ids, counts, self.idf_.take(ids)))

    def reader(self, weights_FC: Floats) -> Reader:
        """Return what hashes one query at a time.

        Basis, weights and idf stand side by side: the time goes into fetching a row per n-gram from
        a table much larger than the caches, so it is fetched once for all.
        """
        table = side_by_side(self._basis(), weights_FC, self.idf_[:, None])
        first, last = self.num_dimensions, self.num_dimensions + weights_FC.shape[1]

        def read(text: str) -> Reading:
            ids, counts = self._count(text)
            rows = table.take(ids, axis=0)
            values = self._weigh_one(ids, counts, rows[:, last])
            sums = values.dot(rows)
            return Reading(Features(ids, values), sums[first:last], sums[:first])

        return read

    def matrix(self, texts: Sequence[str]) -> sp.csr_matrix:
        """Return the weighted n-grams of many queries, known ones only."""
        matrix = self._weigh(self._counts(texts))
        known = np.zeros(self.num_features, np.bool_)
        known[self.known_] = True
        matrix.data[~known[matrix.indices]] = 0
        matrix.eliminate_zeros()
        return matrix

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return `matrix`, and the latent semantic coordinates of many queries."""
        matrix = self.matrix(texts)
        return Encoded(matrix, np.asarray(matrix @ self._basis(), np.float32))

    def names(self, text: str) -> dict[int, str]:
        """Return the n-grams of `text` by feature id; the first one where two share an id."""
        raw = clip(text)
        grams = self._hash(raw)
        words, pairs, windows = np.split(grams.ids, [grams.num_words, grams.first_window])
        starts, ends = grams.edges[::2] + 1, grams.edges[1::2] + 1
        spans = [
            *zip(words, starts, ends, strict=True),
            *zip(pairs, starts[:-1], ends[1:], strict=True),
            *((feature, i, i + self.window) for i, feature in enumerate(windows)),
        ]
        found: dict[int, str] = {}
        for feature, start, end in spans:
            found.setdefault(int(feature), raw[start:end].decode("utf-8", "replace"))
        return found

    def settings(self) -> dict[str, Any]:
        """Return the hyperparameters."""
        return {
            "bits": self.bits,
            "window": self.window,
            "num_dimensions": self.num_dimensions,
            "seed": self.seed,
        }

    def arrays(self) -> Arrays:
        """Return idf and basis of the known features, and the idf of the rest."""
        return {
            "known": self.known_,
            "idf": self.idf_[self.known_],
            "rare_idf": self.idf_.max(keepdims=True),
            "basis": self.basis_,
        }

    def restore(self, arrays: Arrays) -> Self:
        """Take back what `arrays` returned."""
        known, basis = arrays["known"], arrays["basis"]
        if (
            basis.shape != (len(known), self.num_dimensions)
            or arrays["idf"].shape != known.shape
            or arrays["rare_idf"].shape != (1,)
            or (len(known) and not 0 <= known.min() <= known.max() < self.num_features)
        ):
            raise PolicyError("ngrams: the arrays do not fit bits and num_dimensions")
        self.known_ = known
        self.idf_ = np.full(self.num_features, arrays["rare_idf"][0], np.float32)
        self.idf_[known] = arrays["idf"]
        self.basis_ = basis.astype(np.float16)
        return self

    def _basis(self) -> Floats:
        """Return the basis of all features, [F, D]; zero for those that training did not know."""
        basis_FD = np.zeros((self.num_features, self.num_dimensions), np.float32)
        basis_FD[self.known_] = self.basis_
        return basis_FD

    def _count(self, text: str) -> tuple[Ids, NDArray[np.int64]]:
        """Return distinct ids in order, and how often each occurs."""
        return self._hash(clip(text)).counted()

    def _weigh_one(self, ids: Ids, counts: NDArray[np.int64], idf: Floats) -> Floats:
        """Return the values of one query's features, whose ids are in order."""
        values: Floats = _SUBLINEAR.take(counts)
        values *= idf
        first_window = ids.searchsorted(self._first_id_of_windows)
        for block in (values[:first_window], values[first_window:]):
            scale = 1 / math.sqrt(max(2 * float(block.dot(block)), 1e-12))
            np.multiply(block, scale, out=block)
        return values

    def _counts(self, texts: Sequence[str]) -> sp.csr_matrix:
        rows = [self._count(text) for text in texts]
        pointers = np.cumsum([0, *(len(ids) for ids, _ in rows)])
        ids = np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in rows)])
        counts = np.concatenate([np.empty(0, np.int64), *(counts for _, counts in rows)])
        return sp.csr_matrix((counts, ids, pointers), shape=(len(texts), self.num_features))

    def _weigh(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        weighted = counts.astype(np.float32)
        weighted.data = _SUBLINEAR.take(counts.data) * self.idf_[weighted.indices]
        block = weighted.indices >> self.bits
        row = np.repeat(np.arange(len(weighted.indptr) - 1), np.diff(weighted.indptr))
        norms = np.sqrt(np.bincount(2 * row + block, weights=weighted.data**2))
        weighted.data /= (np.sqrt(2) * norms[2 * row + block]).astype(np.float32)
        return weighted
