"""Hashed word and character n-grams: no download, NumPy only, tens of microseconds per query.

Words, pairs of words, and windows of characters are hashed all at once. With h the per-byte codes
and B an odd base, the prefix sums S_i = Σ_{j<i} h_j B^j (mod 2^64) give any span's Rabin-Karp hash
(S_e - S_s) B^-s, so words and windows cost one subtraction and one product per span, whatever their
length. Upper and lower case, all digits, and all white space look the same: a router should know
sums from stories, not 37 from 38. It does not know meaning: two queries are alike when they share
n-grams.

A query is a few hundred bytes, so time goes into NumPy's calls, not into numbers: each array is
made once and worked on in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.utils.extmath import randomized_svd

from policies.encoders.base import Arrays, Encoded, Features, Floats, Ids, Reader, Reading
from policies.errors import PolicyError

Hashes = NDArray[np.uint64]

MAX_BYTES: Final = 2048

BASIS_QUERIES: Final = 4096
"""So many training queries, at most, show in which directions queries differ most."""

_HALF: Final = MAX_BYTES // 2
_BASE: Final = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_MIX: Final = np.uint64(0xD6E8FEB86659FD93)
_BIGRAM: Final = np.array(0xC2B2AE3D27D4EB4F, np.uint64)
_MODULUS: Final = 1 << 64
_LINE_BYTES: Final = 64
_LINE: Final = _LINE_BYTES // np.dtype(np.float32).itemsize

_SUBLINEAR: Final = np.log(np.arange(MAX_BYTES + 1).clip(1), dtype=np.float32) + np.float32(1)
"""1 + ln(count), by count: no n-gram occurs more often than a query has bytes."""


class Grams(NamedTuple):
    """The ids of a query's words, then word pairs, then windows, in the order of the text.

    A word begins after each even one of `edges`, and ends with the byte at the next odd one. Pairs
    begin at `ids[num_words]`, windows at `ids[first_window]`. In `fenced` a -1 stands at either end
    of them, so that runs of equal ids begin and end there as anywhere else.
    """

    fenced: Ids
    edges: NDArray[np.int64]
    num_words: int
    first_window: int

    @property
    def ids(self) -> Ids:
        """The ids; a window's are 2^bits and above."""
        return self.fenced[1:-1]

    def counted(self) -> tuple[Ids, NDArray[np.int64]]:
        """Return the distinct ids in order, and how often each occurs; sorts `ids` in place."""
        self.ids.sort()
        changes = (self.fenced[1:] != self.fenced[:-1]).nonzero()[0]
        last = changes[1:]
        return self.fenced.take(last), last - changes[:-1]


def _powers(base: int) -> Hashes:
    powers = [1]
    for _ in range(MAX_BYTES + 8):
        powers.append(powers[-1] * base % _MODULUS)
    return np.array(powers, np.uint64)


def _codes() -> Hashes:
    """Return a random code per byte; bytes that should look the same share one.

    Hashes are sums of codes, so that mixing the codes mixes the hashes.
    """
    alike = np.arange(256)
    alike[ord("0") : ord("9") + 1] = ord("0")
    alike[[9, 10, 11, 12, 13]] = ord(" ")
    codes = np.random.default_rng(20260101).integers(1, 1 << 63, 256, dtype=np.uint64)
    return codes[alike] * _MIX


_POWERS: Final = _powers(_BASE)
_INVERSES: Final = _powers(pow(_BASE, -1, _MODULUS))
_AFTER: Final = _INVERSES[1:]
_CODES: Final = _codes()
_IN_WORD: Final = bytes(byte >= 128 or chr(byte).isalnum() for byte in range(256))


def clip(text: str) -> bytes:
    """Return the bytes that count: lower case, a space at both ends, `MAX_BYTES` at most."""
    if len(text) > MAX_BYTES:
        text = text[:_HALF] + text[-_HALF:]
    raw = f" {text.lower()} ".encode("utf-8", "replace")
    return raw if len(raw) <= MAX_BYTES else raw[:_HALF] + raw[-_HALF:]


class Hasher:
    """Hashes words and pairs to [0, 2^`bits`), windows of `window` bytes to the 2^bits above.

    A word is a run of letters, digits and non-ASCII bytes.
    """

    def __init__(self, *, bits: int, window: int) -> None:
        self._window = window
        # As arrays: NumPy takes longer over a number than over the rest of a call.
        self._shift = np.array(64 - bits, np.uint64)
        self._first_id_of_windows = np.array(1 << bits, np.int32)

    def __call__(self, raw: bytes) -> Grams:
        """Hash what `clip` returned."""
        num_bytes, window = len(raw), self._window
        sums = np.empty(num_bytes + 1, np.uint64)
        sums[0] = 0
        codes = _CODES.take(np.frombuffer(raw, np.uint8))
        codes *= _POWERS[:num_bytes]
        sums_after = sums[1:]
        np.add.accumulate(codes, out=sums_after)
        inside = np.frombuffer(raw.translate(_IN_WORD), np.bool_)
        # The text starts and ends with a space (or was cut inside a word, at a seam only), so that
        # edges come in pairs.
        edges = (inside[1:] != inside[:-1]).nonzero()[0]
        sums_at = sums_after[edges]
        num_words = len(edges) // 2
        first_window = max(0, 2 * num_words - 1)
        num_windows = max(0, num_bytes - window + 1)
        hashes = np.empty(first_window + num_windows, np.uint64)
        words, pairs = hashes[:num_words], hashes[num_words:first_window]
        np.subtract(sums_at[1::2], sums_at[::2], out=words)
        words *= _AFTER[edges[::2]]
        np.multiply(words[:-1], _BIGRAM, out=pairs)
        pairs += words[1:]
        windows = hashes[first_window:]
        np.subtract(sums[window:], sums[:num_windows], out=windows)
        windows *= _INVERSES[:num_windows]
        hashes >>= self._shift
        fenced = np.empty(len(hashes) + 2, np.int32)
        fenced[0] = fenced[-1] = -1
        fenced[1:-1] = hashes
        fenced[first_window + 1 : -1] += self._first_id_of_windows
        return Grams(fenced, edges, num_words, first_window)


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
        self._learn(self._counts(texts))
        return self

    def fit_encode(self, texts: Sequence[str]) -> Encoded:
        """Learn them, and return matrix and points of the same queries, which are counted once."""
        counts = self._counts(texts)
        self._learn(counts)
        return self._encoded(counts)

    def _learn(self, counts: sp.csr_matrix) -> None:
        num_texts = counts.shape[0]
        df = np.bincount(counts.indices, minlength=self.num_features)
        self.idf_ = (np.log((1 + num_texts) / (1 + np.maximum(df, 1))) + 1).astype(np.float32)
        self.known_ = np.flatnonzero(df >= 2)
        sample = np.random.default_rng(self.seed).permutation(num_texts)[:BASIS_QUERIES]
        matrix = self._weigh(counts[np.sort(sample)])[:, self.known_]
        rank = min(self.num_dimensions, min(matrix.shape) - 1)
        self.basis_ = np.zeros((len(self.known_), self.num_dimensions), np.float16)
        if rank > 0:
            # Two power iterations are enough for clustering.
            _, _, vectors = randomized_svd(matrix, rank, n_iter=2, random_state=self.seed)
            self.basis_[:, :rank] = vectors.T

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
        return self._known(self._counts(texts))

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return `matrix`, and the latent semantic coordinates of many queries."""
        return self._encoded(self._counts(texts))

    def _encoded(self, counts: sp.csr_matrix) -> Encoded:
        matrix = self._known(counts)
        return Encoded(matrix, np.asarray(matrix @ self._basis(), np.float32))

    def _known(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        matrix = self._weigh(counts)
        known = np.zeros(self.num_features, np.bool_)
        known[self.known_] = True
        matrix.data[~known[matrix.indices]] = 0
        matrix.eliminate_zeros()
        return matrix

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


def side_by_side(*blocks_FC: Floats) -> Floats:
    """Return the blocks as one table, with columns of zeros behind them.

    It is much larger than the caches, and a query needs a few hundred rows of it. Rows are whole
    cache lines, or a fraction of one that is a power of two, so that fetching a row touches as few
    lines as can be: it is what fetching costs (0.6 times the time with 5 columns).
    """
    num_columns = sum(block.shape[1] for block in blocks_FC)
    width = -(-num_columns // _LINE) * _LINE
    if num_columns <= _LINE // 2:
        width = 1 << max(num_columns - 1, 0).bit_length()
    size = len(blocks_FC[0]) * width
    memory = np.zeros(size + _LINE, np.float32)
    first = -memory.ctypes.data % _LINE_BYTES // memory.itemsize
    table = memory[first : first + size].reshape(-1, width)
    np.concatenate(blocks_FC, axis=1, out=table[:, :num_columns])
    return table
