"""Ids of a query's n-grams: words, pairs of words, and windows of characters, all hashed at once.

With h the per-byte codes and B an odd base, the prefix sums S_i = Σ_{j<i} h_j B^j (mod 2^64) give
any span's Rabin-Karp hash (S_e - S_s) B^-s, so words and windows cost one subtraction and one
product per span, whatever their length. Upper and lower case, all digits, and all white space look
the same: a router should know sums from stories, not 37 from 38.

A query is a few hundred bytes, so time goes into NumPy's calls, not into numbers: each array is
made once and worked on in place.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from policies.encoders.base import Ids

Hashes = NDArray[np.uint64]

MAX_BYTES: Final = 2048

_HALF: Final = MAX_BYTES // 2
_BASE: Final = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_MIX: Final = np.uint64(0xD6E8FEB86659FD93)
_BIGRAM: Final = np.array(0xC2B2AE3D27D4EB4F, np.uint64)
_MODULUS: Final = 1 << 64


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
