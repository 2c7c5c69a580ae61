"""A trained router: what it predicts for a query, before anybody weighs quality against cost.

Shape legend: Q queries, F features, M models, D embedding dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.special import expit

from policies.encoders.base import Encoder, Features
from policies.routing.bags import Bags
from policies.routing.topics import Topics

Floats = NDArray[np.float64]

ROWS_AT_ONCE = 16_384
"""Features whose embeddings are held at once while the table is built."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a router says of one query.

    `quality_M` are calibrated expected scores in [0, 1]; `cluster` is the nearest, `similarity`
    how near it is. `deviations_BM` are the bags' predictions, less their mean.
    """

    quality_M: NDArray[np.float32]
    cluster: int
    similarity: float
    deviations_BM: NDArray[np.float32]
    features: Features

    def spread(self, model: int) -> float:
        """Return the bags' standard deviation of that model's score (0 without bags)."""
        deviations_B = self.deviations_BM[:, model]
        return math.sqrt(deviations_B @ deviations_B / max(1, len(deviations_B)))


@dataclass(frozen=True, kw_only=True)
class Router:
    """Encoder, calibrated linear heads, clusters and bags, fitted on one set of outcomes.

    `output_tokens_M` are the models' mean answer lengths (NaN where unknown). `facts` is JSON
    data about the training: data hash, numbers, held-out metrics.
    """

    models: tuple[str, ...]
    encoder: Encoder
    weights_FM: NDArray[np.float32]
    bias_M: NDArray[np.float32]
    topics: Topics
    bags: Bags
    output_tokens_M: NDArray[np.float32]
    facts: Mapping[str, Any] = field(default_factory=dict)
    _table: NDArray[np.float32] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Embeddings are linear in the features, so each feature's share in every similarity can
        # stand beside its weights, as can the bags: one look-up per query gives all.
        num_features, num_models = self.weights_FM.shape
        first_bag = num_models + len(self.topics.centroids_KD)
        table = np.empty((num_features, first_bag + self.bags.bias_BM.size), np.float32)
        table[:, :num_models] = self.weights_FM
        table[:, first_bag:] = self.bags.weights_FBM.reshape(num_features, -1)
        unit = sp.identity(num_features, np.float32, format="csr")
        for start in range(0, num_features, ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            points = self.encoder.embeddings(unit[rows])
            table[rows, num_models:first_bag] = points @ self.topics.centroids_KD.T
        object.__setattr__(self, "_table", table)

    def predict(self, text: str) -> Prediction:
        """Predict for one query."""
        features = self.encoder.features(text)
        num_models, num_clusters = len(self.models), len(self.topics.centroids_KD)
        products = features.values @ self._table.take(features.ids, axis=0)
        logits_M = products[:num_models] + self.bias_M
        similarity_K = products[num_models : num_models + num_clusters]
        bias_BM = self.bags.bias_BM
        cluster = int(similarity_K.argmax())
        return Prediction(
            quality_M=1 / (1 + np.exp(-logits_M)),
            cluster=cluster,
            similarity=float(similarity_K[cluster]),
            deviations_BM=products[num_models + num_clusters :].reshape(bias_BM.shape) + bias_BM,
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
