"""A frozen transformer sentence encoder beside hashed n-grams: meaning and wording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
import scipy.sparse as sp

from policies.encoders.base import Arrays, Features, Floats
from policies.encoders.ngrams import NGrams
from policies.encoders.vectors import SentenceVectors
from policies.errors import PolicyError


class Neural:
    """A transformer's pooled vector beside hashed n-grams, each block of norm about 1.

    `path` is the encoder's folder, which must still be there when the router is loaded.
    `max_tokens` cuts long queries. `weight` scales the transformer's block: the larger, the less
    its weights are regularised. `vectors` encodes in the folder's stead (where the vectors of
    known queries are kept).
    """

    kind = "neural"

    def __init__(
        self,
        *,
        path: str,
        max_tokens: int = 256,
        weight: float = 0.5,
        bits: int = 16,
        vectors: Callable[[Sequence[str]], Floats] | None = None,
    ) -> None:
        own = SentenceVectors(path, max_tokens=max_tokens)
        self.path = path
        self.max_tokens = max_tokens
        self.weight = weight
        self.num_dimensions = own.num_dimensions
        self._vectors = vectors or own
        self._ngrams = NGrams(bits=bits, num_dimensions=1)
        self.mean_: Floats = np.zeros(self.num_dimensions, np.float32)

    @property
    def num_features(self) -> int:
        """The n-grams, then the vector."""
        return self._ngrams.num_features + self.num_dimensions

    def fit(self, texts: Sequence[str]) -> Self:
        """Learn the n-grams' weights and the vectors' mean, which says nothing of a query."""
        self._ngrams.fit(texts)
        self.mean_ = self._vectors(texts).mean(0)
        return self

    def features(self, text: str) -> Features:
        """Return the features of one query."""
        grams = self._ngrams.features(text)
        vector = self._centred([text])[0] * np.float32(self.weight)
        own = np.arange(self._ngrams.num_features, self.num_features)
        return Features(np.concatenate((grams.ids, own)), np.concatenate((grams.values, vector)))

    def matrix(self, texts: Sequence[str]) -> sp.csr_matrix:
        """Return `features` of many queries."""
        dense = sp.csr_matrix(self._centred(texts) * np.float32(self.weight))
        return sp.csr_matrix(sp.hstack([self._ngrams.matrix(texts), dense], dtype=np.float32))

    def embeddings(self, matrix: sp.csr_matrix) -> Floats:
        """Return the centred vectors."""
        dense = matrix[:, self._ngrams.num_features :].toarray()
        return np.asarray(dense / self.weight, np.float32)

    def names(self, text: str) -> dict[int, str]:
        """Return the n-grams; dimensions of a vector have no name."""
        return self._ngrams.names(text)

    def settings(self) -> dict[str, Any]:
        """Return the hyperparameters."""
        return {
            "path": self.path,
            "max_tokens": self.max_tokens,
            "weight": self.weight,
            "bits": self._ngrams.bits,
        }

    def arrays(self) -> Arrays:
        """Return the n-grams' arrays and the mean."""
        return {**self._ngrams.arrays(), "mean": self.mean_}

    def restore(self, arrays: Arrays) -> Self:
        """Take back what `arrays` returned."""
        if arrays["mean"].shape != (self.num_dimensions,):
            raise PolicyError(
                f"neural: the mean has shape {arrays['mean'].shape}, but the encoder at "
                f"{self.path} has {self.num_dimensions} dimensions"
            )
        self._ngrams.restore(arrays)
        self.mean_ = arrays["mean"]
        return self

    def _centred(self, texts: Sequence[str]) -> Floats:
        vectors = self._vectors(texts) - self.mean_
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        centred: Floats = vectors / np.maximum(norms, 1e-6)
        return centred
