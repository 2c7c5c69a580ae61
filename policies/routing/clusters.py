"""Route by what did best on similar training queries."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from policies.routing.learned import Learned
from policies.routing.router import Prediction


class Clusters(Learned):
    """Sends each query to the member that did best on the nearest cluster of training queries.

    k-means over the encoder's embeddings, no trained head: the baseline that beats most trained
    routers (the Avengers, see LLMRouterBench). Price, fallback and explanation as in `Learned`.
    """

    predictor = "mean"

    def _quality(self, prediction: Prediction) -> NDArray[np.float32]:
        scores_M: NDArray[np.float32] = self._router.topics.scores_KM[prediction.cluster]
        return scores_M

    def _spread(self, prediction: Prediction, model: int) -> float:  # noqa: ARG002
        return 0.0  # bags vary the trained heads, which have no say here
