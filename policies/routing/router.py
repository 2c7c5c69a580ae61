"""A trained router: what it predicts for a query, before anybody weighs quality against cost.

Shape legend: Q queries, F features of the encoder, N of the landmarks, M models, B bags,
D dimensions of a point, L landmarks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from policies.encoders.base import Encoder, Features
from policies.routing.bags import Bags
from policies.routing.landmarks import Landmarks
from policies.routing.topics import Topics

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a router says of one query.

    `quality_M` are calibrated expected scores in [0, 1]; `cluster` is the nearest, `similarity`
    how near it is. `deviations_BM` are the bags' predictions, less their mean. `likeness_M` is the
    share of the logits that is owed to landmarks.
    """

    quality_M: NDArray[np.float32]
    cluster: int
    similarity: float
    deviations_BM: NDArray[np.float32]
    likeness_M: NDArray[np.float32]
    features: Features

    def spread(self, model: int) -> float:
        """Return the bags' standard deviation of that model's score (0 without bags)."""
        deviations_B = self.deviations_BM[:, model]
        return math.sqrt(deviations_B @ deviations_B / max(1, len(deviations_B)))


@dataclass(frozen=True, kw_only=True)
class Router:
    """Encoder, landmarks, calibrated heads, clusters and bags, fitted on one set of outcomes.

    `weights_FM` [F + N, M] and the bags weigh the encoder's features, then the landmarks'.
    `output_tokens_M` are the models' mean answer lengths (NaN where unknown). `facts` is JSON
    data about the training: data hash, numbers, held-out metrics.
    """

    models: tuple[str, ...]
    encoder: Encoder
    landmarks: Landmarks
    weights_FM: NDArray[np.float32]
    bias_M: NDArray[np.float32]
    topics: Topics
    bags: Bags
    output_tokens_M: NDArray[np.float32]
    facts: Mapping[str, Any] = field(default_factory=dict)
    _table: NDArray[np.float32] = field(init=False, repr=False, compare=False)
    _raw: Landmarks = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # A feature's weights stand beside its shares in the bags: one look-up per query gives all.
        num_features = self.encoder.num_features
        num_bags, num_models = self.bags.bias_BM.shape
        bags = self.bags.weights_FBM.reshape(len(self.weights_FM), num_bags * num_models)
        weights = np.hstack([self.weights_FM, bags])
        object.__setattr__(self, "_table", weights[:num_features])
        # The landmarks' mixing is linear, as is what weighs it: one product instead of two.
        mixed = self.landmarks.mix_LN @ weights[num_features:]
        object.__setattr__(self, "_raw", replace(self.landmarks, mix_LN=mixed))

    def predict(self, text: str) -> Prediction:
        """Predict for one query."""
        features = self.encoder.features(text)
        num_models = len(self.models)
        products = features.values @ self._table.take(features.ids, axis=0)
        near = self._raw.features(features.point_D[None])[0]
        products += near
        logits_M = products[:num_models] + self.bias_M
        similarity_K = self.topics.centroids_KD @ features.point_D
        bias_BM = self.bags.bias_BM
        cluster = int(similarity_K.argmax())
        return Prediction(
            quality_M=1 / (1 + np.exp(-logits_M)),
            cluster=cluster,
            similarity=float(similarity_K[cluster]),
            deviations_BM=products[num_models:].reshape(bias_BM.shape) + bias_BM,
            likeness_M=near[:num_models],
            features=features,
        )

    def qualities(self, texts: Sequence[str]) -> Floats:
        """Return the heads' expected scores [Q, M] for many queries at once."""
        features = self.landmarks.beside(self.encoder.encode(texts))
        logits = np.asarray(features @ self.weights_FM, np.float64)
        quality: Floats = expit(logits + self.bias_M)
        return quality

    def cluster_qualities(self, texts: Sequence[str]) -> Floats:
        """Return the mean scores [Q, M] of each query's nearest cluster."""
        labels = self.topics.assign(self.encoder.encode(texts).points_QD)
        return self.topics.scores_KM[labels].astype(np.float64)
