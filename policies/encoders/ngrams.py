"""Hashed word and character n-grams: no download, NumPy only, tens of microseconds per query.

Every n-gram of a query is hashed at once. With h the per-byte codes and B an odd base, the prefix
sums S_i = Σ_{j<i} h_j B^j (mod 2^64) give any span's Rabin-Karp hash (S_e - S_s) B^-s, so words
and character windows cost one subtraction and one product per span, whatever their length. Upper
and lower case, all digits, and all white space look the same: a router should know sums from
stories, not 37 from 38.

It does not know meaning: two queries are alike when they share n-grams.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.utils.extmath import randomized_svd

from policies.encoders.base import Arrays, Encoded, Features, Floats, Ids
from policies.errors import PolicyError

Hashes = NDArray[np.uint64]

MAX_BYTES: Final = 2048
BASIS_QUERIES: Final = 4096
"""So many training queries, at most, show in which directions queries differ most."""

_HALF: Final = MAX_BYTES // 2
_BASE: Final = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_MIX: Final = np.uint64(0xD6E8FEB86659FD93)
_BIGRAM: Final = np.uint64(0xC2B2AE3D27D4EB4F)
_MODULUS: Final = 1 << 64


def _powers(base: int) -> Hashes:
    powers = [1]
    for _ in range(MAX_BYTES + 8):
        powers.append(powers[-1] * base % _MODULUS)
    return np.array(powers, np.uint64)


def _codes() -> Hashes:
    """Return a random code per byte; bytes that should look the same share one."""
    alike = np.arange(256)
    alike[ord("0") : ord("9") + 1] = ord("0")
    alike[[9, 10, 11, 12, 13]] = ord(" ")
    codes = np.random.default_rng(20260101).integers(1, 1 << 63, 256, dtype=np.uint64)
    return codes[alike]


def _in_word() -> NDArray[np.bool_]:
    return np.array([byte >= 128 or chr(byte).isalnum() for byte in range(256)])


_POWERS: Final = _powers(_BASE)
_INVERSES: Final = _powers(pow(_BASE, -1, _MODULUS))
_CODES: Final = _codes()
_IN_WORD: Final = _in_word()


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
        self.known_ = np.empty(0, np.int64)
        self.idf_ = np.ones(self.num_features, np.float32)
        self.basis_ = np.zeros((self.num_features, num_dimensions), np.float32)

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
        self.basis_ = np.zeros((self.num_features, self.num_dimensions), np.float32)
        if rank > 0:
            # Two power iterations are enough for clustering.
            _, _, vectors = randomized_svd(matrix, rank, n_iter=2, random_state=self.seed)
            self.basis_[self.known_, :rank] = vectors.T.astype(np.float16)
        return self

    def features(self, text: str) -> Features:
        """Return the weighted n-grams of one query, and its latent semantic coordinates."""
        ids, counts, num_words = self._count(text)
        values: Floats = np.log(counts, dtype=np.float32)
        values += np.float32(1)
        values *= self.idf_.take(ids)
        for block in (values[:num_words], values[num_words:]):
            scale = 1 / math.sqrt(max(2 * float(block @ block), 1e-12))
            np.multiply(block, np.float32(scale), out=block)
        return Features(ids, values, values @ self.basis_.take(ids, axis=0))

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
        return Encoded(matrix, np.asarray(matrix @ self.basis_, np.float32))

    def names(self, text: str) -> dict[int, str]:
        """Return the n-grams of `text` by feature id; the first one where two share an id."""
        raw = _clip(text)
        starts, ends = _words(raw)
        ids, first_pair, first_window = self._ids(raw, starts, ends)
        words, pairs, windows = np.split(ids, [first_pair, first_window])
        spans = [
            *zip(words, starts, ends, strict=True),
            *zip(pairs, starts[:-1], ends[1:], strict=True),
            *((feature, i, i + self.window) for i, feature in enumerate(windows)),
        ]
        found: dict[int, str] = {}
        for feature, start, end in spans:
            found.setdefault(int(feature), raw[start:end].tobytes().decode("utf-8", "replace"))
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
            "basis": self.basis_[self.known_].astype(np.float16),
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
        self.basis_ = np.zeros((self.num_features, self.num_dimensions), np.float32)
        self.basis_[known] = basis
        return self

    def _ids(
        self, raw: NDArray[np.uint8], starts: Ids, ends: Ids
    ) -> tuple[NDArray[np.uint32], int, int]:
        """Return the ids of words, word pairs and windows, and where pairs and windows begin."""
        sums = np.zeros(len(raw) + 1, np.uint64)
        np.cumsum(_CODES.take(raw) * _POWERS[: len(raw)], out=sums[1:])
        words = (sums.take(ends) - sums.take(starts)) * _INVERSES.take(starts)
        pairs = words[:-1] * _BIGRAM + words[1:]
        num_windows = max(0, len(raw) - self.window + 1)
        windows = (sums[self.window :] - sums[:num_windows]) * _INVERSES[:num_windows]
        hashes = np.concatenate((words, pairs, windows))
        hashes *= _MIX
        hashes >>= np.uint64(64 - self.bits)
        ids = hashes.astype(np.uint32)
        first_window = len(words) + len(pairs)
        ids[first_window:] += np.uint32(1 << self.bits)
        return ids, len(words), first_window

    def _count(self, text: str) -> tuple[Ids, Floats, int]:
        """Return distinct ids in order, how often each occurs, and how many are of words."""
        raw = _clip(text)
        ids, _, _ = self._ids(raw, *_words(raw))
        ids.sort()
        # The first of each run of equal ids, and where the last run ends.
        edge = np.empty(len(ids) + 1, np.bool_)
        edge[0] = edge[-1] = True
        np.not_equal(ids[1:], ids[:-1], out=edge[1:-1])
        edges = edge.nonzero()[0]
        distinct = ids.take(edges[:-1]) if len(ids) else ids
        counts = (edges[1:] - edges[:-1]).astype(np.float32)
        return distinct.astype(np.int64), counts, int(distinct.searchsorted(1 << self.bits))

    def _counts(self, texts: Sequence[str]) -> sp.csr_matrix:
        rows = [self._count(text) for text in texts]
        pointers = np.cumsum([0, *(len(ids) for ids, _, _ in rows)])
        ids = np.concatenate([ids for ids, _, _ in rows] or [np.empty(0, np.int64)])
        counts = np.concatenate([counts for _, counts, _ in rows] or [np.empty(0, np.float32)])
        return sp.csr_matrix((counts, ids, pointers), shape=(len(texts), self.num_features))

    def _weigh(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        weighted = counts.astype(np.float32)
        weighted.data = (1 + np.log(weighted.data)) * self.idf_[weighted.indices]
        block = weighted.indices >> self.bits
        row = np.repeat(np.arange(len(weighted.indptr) - 1), np.diff(weighted.indptr))
        norms = np.sqrt(np.bincount(2 * row + block, weights=weighted.data**2))
        weighted.data /= (np.sqrt(2) * norms[2 * row + block]).astype(np.float32)
        return weighted


def _clip(text: str) -> NDArray[np.uint8]:
    """Return the bytes that count: lower case, a space at both ends, `MAX_BYTES` at most."""
    if len(text) > MAX_BYTES:
        text = text[:_HALF] + text[-_HALF:]
    raw = f" {text.lower()} ".encode("utf-8", "replace")
    if len(raw) > MAX_BYTES:
        raw = raw[:_HALF] + raw[-_HALF:]
    return np.frombuffer(raw, np.uint8)


def _words(raw: NDArray[np.uint8]) -> tuple[Ids, Ids]:
    """Return where words start and end (exclusive): runs of letters, digits, non-ASCII bytes."""
    inside = _IN_WORD.take(raw)
    edges = (inside[1:] != inside[:-1]).nonzero()[0] + 1
    # The text starts and ends with a space (or was cut inside a word, at a seam only), so that
    # edges come in pairs.
    return edges[::2], edges[1::2]
