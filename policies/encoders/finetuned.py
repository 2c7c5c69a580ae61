"""A transformer that was trained end to end as a router: its own vector, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import scipy.sparse as sp

from policies.encoders.base import Arrays, Encoded, Features, Floats, Reader, Reading
from policies.encoders.vectors import SentenceVectors
from policies.errors import PolicyError


class FineTuned:
    """The pooled unit vector of the transformer at `path`; its point is that less the mean.

    `policies.routing.finetune` trains such an encoder; `fit` only learns the mean.
    """

    kind = "finetuned"

    def __init__(self, *, path: str, max_tokens: int = 256) -> None:
        self.vectors = SentenceVectors(path, max_tokens=max_tokens)
        self.num_dimensions = self.vectors.num_dimensions
        self.num_features = self.num_dimensions
        self.mean_: Floats = np.zeros(self.num_dimensions, np.float32)

    def fit(self, texts: Sequence[str]) -> Self:
        """Learn the mean vector."""
        self.mean_ = self.vectors(texts).mean(0)
        return self

    def features(self, text: str) -> Features:
        """Return the vector of one query."""
        return Features(np.arange(self.num_features, dtype=np.int32), self.vectors([text])[0])

    def reader(self, weights_FC: Floats) -> Reader:
        """Return what encodes one query at a time."""
        mean = self.mean_

        def read(text: str) -> Reading:
            features = self.features(text)
            point_D = (features.values - mean) / np.float32(2)
            return Reading(features, features.weighed(weights_FC), point_D)

        return read

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return the vectors of many queries."""
        vectors = self.vectors(texts)
        points = (vectors - self.mean_) / np.float32(2)
        return Encoded(sp.csr_matrix(vectors), points)

    def names(self, text: str) -> dict[int, str]:  # noqa: ARG002
        """Return nothing: dimensions of a vector have no name."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return the hyperparameters."""
        return {"path": self.vectors.path, "max_tokens": self.vectors.max_tokens}

    def arrays(self) -> Arrays:
        """Return the mean."""
        return {"mean": self.mean_}

    def restore(self, arrays: Arrays) -> Self:
        """Take back what `arrays` returned."""
        if arrays["mean"].shape != (self.num_dimensions,):
            raise PolicyError(
                f"finetuned: the mean has shape {arrays['mean'].shape}, but the encoder at "
                f"{self.vectors.path} has {self.num_dimensions} dimensions"
            )
        self.mean_ = arrays["mean"]
        return self
