"""A frozen transformer sentence encoder beside hashed n-grams: meaning and wording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np

from policies.encoders.base import Arrays, Encoded, Features, Floats, Reader, Reading
from policies.encoders.ngrams import NGrams
from policies.encoders.vectors import SentenceVectors
from policies.errors import PolicyError

LayerVectors = Callable[[Sequence[str], Sequence[int]], Floats]


class Neural:
    """Hashed n-grams as features; as the point, a transformer's pooled vectors side by side.

    The vectors are those after `num_layers` of its layers, evenly spaced with the last among them,
    each less its mean: routing lives off what the lower layers still know and the last, trained to
    tell meanings apart, has given up. `path` is the encoder's folder, which must still be there
    when the router is loaded; `max_tokens` cuts long queries. `vectors` encodes in the folder's
    stead (where the vectors of known queries are kept).
    """

    kind = "neural"

    def __init__(
        self,
        *,
        path: str,
        max_tokens: int = 256,
        num_layers: int = 6,
        bits: int = 16,
        vectors: LayerVectors | None = None,
    ) -> None:
        own = SentenceVectors(path, max_tokens=max_tokens)
        if num_layers < 1:
            raise PolicyError(f"neural.num_layers: {num_layers} is not at least 1")
        num_taken = min(num_layers, own.num_layers)
        self.path = path
        self.max_tokens = max_tokens
        self.num_layers = num_layers
        self.layers = [own.num_layers * (i + 1) // num_taken for i in range(num_taken)]
        self.num_dimensions = num_taken * own.num_dimensions
        self._vectors = vectors or own.of_layers
        self._ngrams = NGrams(bits=bits, num_dimensions=1)
        self.mean_: Floats = np.zeros((num_taken, own.num_dimensions), np.float32)

    @property
    def num_features(self) -> int:
        """The n-grams."""
        return self._ngrams.num_features

    def fit(self, texts: Sequence[str]) -> Self:
        """Learn the n-grams' weights and the vectors' means, which say nothing of a query."""
        self._ngrams.fit(texts)
        self.mean_ = self._vectors(texts, self.layers).mean(0)
        return self

    def features(self, text: str) -> Features:
        """Return the n-grams of one query."""
        return self._ngrams.features(text)

    def reader(self, weights_FC: Floats) -> Reader:
        """Return what hashes and encodes one query at a time."""
        read_ngrams = self._ngrams.reader(weights_FC)
        mean = self.mean_

        def read(text: str) -> Reading:
            return read_ngrams(text)._replace(point_D=self._points([text], mean)[0])

        return read

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return the n-grams and the vectors of many queries."""
        return Encoded(self._ngrams.matrix(texts), self._points(texts, self.mean_))

    def names(self, text: str) -> dict[int, str]:
        """Return the n-grams."""
        return self._ngrams.names(text)

    def settings(self) -> dict[str, Any]:
        """Return the hyperparameters."""
        return {
            "path": self.path,
            "max_tokens": self.max_tokens,
            "num_layers": self.num_layers,
            "bits": self._ngrams.bits,
        }

    def arrays(self) -> Arrays:
        """Return the n-grams' arrays and the means."""
        return {**self._ngrams.arrays(), "mean": self.mean_}

    def restore(self, arrays: Arrays) -> Self:
        """Take back what `arrays` returned."""
        if arrays["mean"].shape != self.mean_.shape:
            raise PolicyError(
                f"neural: the mean has shape {arrays['mean'].shape}, but {len(self.layers)} layers "
                f"of the encoder at {self.path} have {self.mean_.shape}"
            )
        self._ngrams.restore(arrays)
        self.mean_ = arrays["mean"]
        return self

    def _points(self, texts: Sequence[str], mean: Floats) -> Floats:
        """Return the centred vectors, scaled alike, side by side: a point has norm 1."""
        centred = self._vectors(texts, self.layers) - mean
        norms = np.linalg.norm(centred, axis=-1, keepdims=True)
        centred /= np.maximum(norms * np.sqrt(len(self.layers)), 1e-6)
        return np.asarray(centred.reshape(len(texts), -1), np.float32)
