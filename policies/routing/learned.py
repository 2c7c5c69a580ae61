"""Route by a trained router's predictions (ZOOTER, Lu et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from policies.base import Decision, ModelFacts, Policy, Query
from policies.plan import Answer, Plan
from policies.routing.choice import Trade, make_chooser
from policies.routing.router import Prediction, Router

NUM_NGRAMS_SHOWN = 8


class Learned(Policy):
    """Sends each query to the member whose predicted quality is worth its price.

    A query unlike the training queries gets `fallback`, the safe plan, as does one whose chosen
    member's predicted quality depends too much on which queries were learned from; without a
    fallback the predictions are used all the same, and tend to the training averages.
    """

    predictor: ClassVar[str] = "predicted"

    def __init__(
        self,
        router: Router,
        *,
        models: Mapping[str, ModelFacts],
        trade: Trade | None = None,
        fallback: Plan | None = None,
    ) -> None:
        self._router = router
        self._fallback = fallback
        self._chooser = make_chooser(
            trade or Trade(), router.models, router.output_tokens_M, models
        )
        self._allowed = [(router.models[m], m) for m in self._chooser.allowed.tolist()]
        self._names = tuple(name for name, _ in self._allowed)
        self._plans = tuple(Answer(members=(name,)) for name in router.models)

    @property
    def router(self) -> Router:
        """The trained router behind the decisions."""
        return self._router

    def decide(self, query: Query) -> Decision:
        """Return the plan for `query`."""
        prediction = self._router.predict(query.text)
        decision = self._decide(query, prediction)
        if not query.explain:
            return decision
        return replace(decision, details=self._details(query, prediction))

    def plans(self) -> Iterable[Plan]:
        """Return each member to choose from, and the fallback."""
        yield from (self._plans[m] for _, m in self._allowed)
        if self._fallback is not None:
            yield self._fallback

    def _details(self, query: Query, prediction: Prediction) -> dict[str, Any]:
        """Return what explains the decision: members, cluster, n-grams, likeness."""
        quality_M = self._quality(prediction)
        costs_M = self._chooser.costs_usd(query)
        chosen = self._chooser.choose(query, quality_M)
        return {
            "members": [
                {
                    "model": name,
                    "predicted_quality": round(float(quality_M[m]), 4),
                    "spread": round(self._spread(prediction, m), 4),
                    "expected_usd": float(costs_M[m]),
                }
                for name, m in self._allowed
            ],
            "nearest_cluster": self._cluster(prediction),
            "strongest_ngrams": self._ngrams(query.text, prediction, chosen),
            "likeness_logit": self._likeness(prediction, chosen),
        }

    def _quality(self, prediction: Prediction) -> NDArray[np.float32]:
        return prediction.quality_M

    def _spread(self, prediction: Prediction, model: int) -> float:
        return self._router.spread(prediction, model)

    def _decide(self, query: Query, prediction: Prediction) -> Decision:
        quality_M = self._quality(prediction)
        allowed: list[float] = quality_M[self._chooser.allowed].tolist()
        scores = dict(zip(self._names, allowed, strict=True))
        familiar_above = self._router.topics.familiar_above
        if self._fallback is not None and prediction.similarity < familiar_above:
            return Decision(
                plan=self._fallback,
                scores=scores,
                reason=f"unlike the training queries (similarity {prediction.similarity:.2f}, "
                f"familiar from {familiar_above:.2f}): the safe plan",
            )
        chosen = self._chooser.choose(query, quality_M)
        name = self._router.models[chosen]
        if self._fallback is not None:
            spread, usual = self._spread(prediction, chosen), self._router.bags.usual_up_to
            if spread > usual:
                return Decision(
                    plan=self._fallback,
                    scores=scores,
                    reason=f"unsure of {name} ({scores[name]:.2f} ± {spread:.2f} between "
                    f"bootstrap fits, usual up to {usual:.2f}): the safe plan",
                )
        return Decision(
            plan=self._plans[chosen],
            scores=scores,
            reason=f"{name} has the best {self.predictor} quality for its price "
            f"({scores[name]:.2f})",
        )

    def _cluster(self, prediction: Prediction) -> dict[str, Any]:
        topics = self._router.topics
        scores_M = topics.scores_KM[prediction.cluster]
        return {
            "id": prediction.cluster,
            "num_training_queries": int(topics.sizes_K[prediction.cluster]),
            "similarity": round(prediction.similarity, 4),
            "familiar_above": round(topics.familiar_above, 4),
            "mean_scores": {name: round(float(scores_M[m]), 4) for name, m in self._allowed},
        }

    def _ngrams(self, text: str, prediction: Prediction, chosen: int) -> list[dict[str, Any]]:
        """Return what spoke most for `chosen`, or against it, compared with the other members."""
        others = [m for _, m in self._allowed if m != chosen]
        if not others:
            return []
        weights = self._router.weights_FM[prediction.features.ids]
        effect = (weights[:, chosen] - weights[:, others].mean(1)) * prediction.features.values
        names = self._router.encoder.names(text)
        strongest = sorted(
            zip(prediction.features.ids, effect, strict=True), key=lambda pair: -abs(pair[1])
        )
        return [
            {"ngram": names[int(feature)], "logit": round(float(value), 4)}
            for feature, value in strongest[:NUM_NGRAMS_SHOWN]
            if value != 0 and int(feature) in names
        ]

    def _likeness(self, prediction: Prediction, chosen: int) -> float:
        """Return what likeness to training queries says for `chosen`, against the other members."""
        others = [m for _, m in self._allowed if m != chosen]
        share_M = prediction.likeness_M
        return round(float(share_M[chosen] - share_M[others].mean()), 4) if others else 0.0
