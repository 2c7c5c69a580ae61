"""A trained router: what it predicts for a query, before anybody weighs quality against cost.

Shape legend: Q queries, F features, M models, D embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from policies.encoders.base import Encoder, Features
from policies.routing.topics import Topics

Floats = NDArray[np.float64]


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

    def predict(self, text: str) -> Prediction:
        """Predict for one query."""
        features = self.encoder.features(text)
        cluster, similarity = self.topics.nearest(self.encoder.embedding(features))
        logits_M = features.values @ self.weights_FM[features.ids] + self.bias_M
        return Prediction(
            quality_M=1 / (1 + np.exp(-logits_M)),
            cluster=cluster,
            similarity=similarity,
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
