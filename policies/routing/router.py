"""A trained router: what it predicts for a query, before anybody weighs quality against cost.

Shape legend: Q queries, F features, M models, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.special import expit

from policies.encoders.base import Encoder, Features
from policies.routing.topics import Topics

Floats = NDArray[np.float64]

ROWS_AT_ONCE = 16_384
"""Features whose embeddings are held at once while the table is built."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a router says of one query.

    `quality_M` are calibrated expected scores in [0, 1]; `cluster` is the nearest, `similarity`
    how near it is.
    """

    quality_M: NDArray[np.float32]
    cluster: int
    similarity: float
    features: Features


@dataclass(frozen=True, kw_only=True)
class Router:
    """Encoder, calibrated linear heads and clusters, fitted on one set of outcomes.

    `output_tokens_M` are the models' mean answer lengths (NaN where unknown). `facts` is JSON
    data about the training: data hash, numbers, held-out metrics.
    """

    models: tuple[str, ...]
    encoder: Encoder
    weights_FM: NDArray[np.float32]
    bias_M: NDArray[np.float32]
    topics: Topics
    output_tokens_M: NDArray[np.float32]
    facts: Mapping[str, Any] = field(default_factory=dict)
    _table: NDArray[np.float32] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Embeddings are linear in the features, so each feature's share in every similarity can
        # stand beside its weights: one look-up per query gives both.
        num_features, num_models = self.weights_FM.shape
        table = np.empty((num_features, num_models + len(self.topics.centroids_KD)), np.float32)
        table[:, :num_models] = self.weights_FM
        unit = sp.identity(num_features, np.float32, format="csr")
        for start in range(0, num_features, ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            points = self.encoder.embeddings(unit[rows])
            table[rows, num_models:] = points @ self.topics.centroids_KD.T
        object.__setattr__(self, "_table", table)

    def predict(self, text: str) -> Prediction:
        """Predict for one query."""
        features = self.encoder.features(text)
        both = features.values @ self._table.take(features.ids, axis=0)
        logits_M = both[: len(self.models)] + self.bias_M
        similarity_K = both[len(self.models) :]
        cluster = int(similarity_K.argmax())
        return Prediction(
            quality_M=1 / (1 + np.exp(-logits_M)),
            cluster=cluster,
            similarity=float(similarity_K[cluster]),
            features=features,
        )

    def qualities(self, texts: Sequence[str]) -> Floats:
        """Return the heads' expected scores [Q, M] for many queries at once."""
        logits = np.asarray(self.encoder.matrix(texts) @ self.weights_FM, np.float64)
        quality: Floats = expit(logits + self.bias_M)
        return quality

    def cluster_qualities(self, texts: Sequence[str]) -> Floats:
        """Return the mean scores [Q, M] of each query's nearest cluster."""
        labels = self.topics.assign(self.encoder.embeddings(self.encoder.matrix(texts)))
        return self.topics.scores_KM[labels].astype(np.float64)
