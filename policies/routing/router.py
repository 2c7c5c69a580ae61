"""A trained router: what it predicts for a query, before anybody weighs quality against cost.

Shape legend: Q queries, F features of the encoder, N of the landmarks, M models, B bags,
L landmarks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from policies.encoders.base import Encoder, Features, Reader
from policies.encoders.tables import side_by_side
from policies.routing.bags import Bags
from policies.routing.landmarks import Landmarks
from policies.routing.nearness import Nearness
from policies.routing.topics import Topics

Floats = NDArray[np.float64]


class Prediction(NamedTuple):
    """What a router says of one query.

    `quality_M` are calibrated expected scores in [0, 1]; `cluster` is the nearest, `similarity`
    how near it is. `near_L` says how near the landmarks are, `likeness_M` which share of the logits
    is owed to them.
    """

    quality_M: NDArray[np.float32]
    cluster: int
    similarity: float
    near_L: NDArray[np.float32]
    likeness_M: NDArray[np.float32]
    features: Features


class _Bag(NamedTuple):
    """One model's bags: what they weigh features by (zeros behind), and the landmarks' kernel."""

    weights_FB: NDArray[np.float32]
    likeness_BL: NDArray[np.float32]
    bias_B: NDArray[np.float32]


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
    _read: Reader = field(init=False, repr=False, compare=False)
    _nearness: Nearness = field(init=False, repr=False, compare=False)
    _likeness_ML: NDArray[np.float32] = field(init=False, repr=False, compare=False)
    _bags: tuple[_Bag, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Lay the arrays out for one query at a time: what is multiplied together lies together."""
        num_features = self.encoder.num_features
        mix_LN = self.landmarks.mix_LN
        # By model: a decision looks at the bags of the model that it has chosen, and no other.
        bags_MFB = np.moveaxis(self.bags.weights_FBM, 2, 0)
        laid_out = {
            "_read": self.encoder.reader(self.weights_FM[:num_features]),
            "_nearness": Nearness(self.landmarks, self.topics),
            # The landmarks' mixing is linear, as is what weighs it: one product instead of two.
            "_likeness_ML": _rows(mix_LN @ self.weights_FM[num_features:]),
            "_bags": tuple(
                _Bag(
                    side_by_side(weights[:num_features]),
                    _rows(mix_LN @ weights[num_features:]),
                    bias_B,
                )
                for weights, bias_B in zip(bags_MFB, self.bags.bias_BM.T, strict=True)
            ),
        }
        for name, value in laid_out.items():
            object.__setattr__(self, name, value)

    def predict(self, text: str) -> Prediction:
        """Predict for one query."""
        features, logits_M, point_D = self._read(text)
        near_L, cluster, similarity = self._nearness.of(point_D)
        likeness_M = self._likeness_ML.dot(near_L)
        logits_M += likeness_M
        logits_M += self.bias_M
        return Prediction(expit(logits_M), cluster, similarity, near_L, likeness_M, features)

    def spread(self, prediction: Prediction, model: int) -> float:
        """Return the bags' standard deviation of that model's score (0 without bags)."""
        bag = self._bags[model]
        deviations_B = prediction.features.weighed(bag.weights_FB)[: len(bag.bias_B)]
        deviations_B += bag.likeness_BL.dot(prediction.near_L)
        deviations_B += bag.bias_B
        return math.sqrt(deviations_B.dot(deviations_B) / max(1, len(deviations_B)))

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


def _rows(columns_LC: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the transpose as an array of its own: dot products run along memory."""
    return np.ascontiguousarray(columns_LC.T)
