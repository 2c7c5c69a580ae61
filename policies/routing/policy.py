"""Policies over a trained router: which member's predicted quality is worth its price."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from policies.base import Decision, ModelFacts, Policy, Query
from policies.errors import PolicyError
from policies.kinds import Settings
from policies.plan import Answer, Name, Plan, PlanField
from policies.registry import BuildContext, PolicyKind
from policies.routing.router import Prediction, Router, load_router

Floats = NDArray[np.float32]

BYTES_PER_TOKEN: Final = 4
"""Where nobody has counted a prompt's tokens, its length in characters over this."""

DEFAULT_OUTPUT_TOKENS: Final = 256
"""An answer's length where neither the outcomes nor the query say."""

NUM_NGRAMS_SHOWN: Final = 8


@dataclass(frozen=True, kw_only=True)
class Trade:
    """Maximises `answer_value_usd` · quality - cost.

    `answer_value_usd` is what one right answer is worth; None means that quality alone counts,
    and the cheaper member wins among equals. `members` are the router's models to choose from
    (None: all of them).
    """

    answer_value_usd: float | None = None
    members: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        value = self.answer_value_usd
        if value is not None and not 0 < value < float("inf"):
            raise PolicyError(f"answer_value_usd: {value} is not a positive number")


@dataclass(frozen=True, kw_only=True)
class Chooser:
    """A trade applied to the models of one router and their rates."""

    trade: Trade
    allowed: NDArray[np.int64]
    input_usd: Floats
    output_usd: Floats
    output_tokens: Floats
    order: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        typical = self.costs_usd(Query(text="", prompt_tokens=100))
        object.__setattr__(self, "order", self.allowed[np.argsort(typical[self.allowed])])

    def costs_usd(self, query: Query) -> Floats:
        """Return what each model's answer to `query` is expected to cost."""
        prompt_tokens = query.prompt_tokens or len(query.text) / BYTES_PER_TOKEN
        tokens = self.output_tokens
        if query.max_tokens:
            tokens = np.minimum(tokens, np.float32(query.max_tokens))
        return self.input_usd * np.float32(prompt_tokens) + self.output_usd * tokens

    def choose(self, query: Query, quality_M: Floats) -> int:
        """Return the index of the member with the best trade, the cheapest among equals."""
        value = self.trade.answer_value_usd
        utility = quality_M
        if value is not None:
            utility = quality_M - self.costs_usd(query) / np.float32(value)
        return int(self.order[utility[self.order].argmax()])


def make_chooser(
    trade: Trade,
    models: Sequence[str],
    output_tokens_M: Floats,
    facts: Mapping[str, ModelFacts],
) -> Chooser:
    """Return a chooser among `models`, a router's; models that `facts` lacks cost nothing.

    Raises `PolicyError` if the trade's members include one that the router does not know.
    """
    names = trade.members or tuple(models)
    for name in names:
        if name not in models:
            raise PolicyError(
                f"members: the router knows nothing of {name!r}; it knows {', '.join(models)}"
            )
    rates = [facts[name].rates if name in facts else None for name in models]
    return Chooser(
        trade=trade,
        allowed=np.array([models.index(name) for name in names]),
        input_usd=np.array([r.usd_per_input_token if r else 0.0 for r in rates], np.float32),
        output_usd=np.array([r.usd_per_output_token if r else 0.0 for r in rates], np.float32),
        output_tokens=np.nan_to_num(output_tokens_M, nan=DEFAULT_OUTPUT_TOKENS).astype(np.float32),
    )


class Learned(Policy):
    """Sends each query to the member whose predicted quality is worth its price.

    As ZOOTER does (Lu et al. 2023), less the price. A query unlike the training queries gets
    `unfamiliar`, the safe plan: by default the member that did best, whatever its price, on whole
    tasks that training had not seen. So does a conversation of which an earlier message would have
    got it: who answers must understand all of it.
    """

    predictor: ClassVar[str] = "predicted"

    def __init__(
        self,
        router: Router,
        *,
        models: Mapping[str, ModelFacts],
        trade: Trade | None = None,
        unfamiliar: Plan | None = None,
    ) -> None:
        self._router = router
        self._unfamiliar = unfamiliar
        self._chooser = make_chooser(
            trade or Trade(), router.models, router.output_tokens_M, models
        )
        self._allowed = [(router.models[m], m) for m in self._chooser.allowed.tolist()]
        self._names = tuple(name for name, _ in self._allowed)
        self._plans = tuple(Answer(members=(name,)) for name in router.models)
        self._safe_plan = unfamiliar or self._plans[self._safest()]

    @property
    def router(self) -> Router:
        """The trained router behind the decisions."""
        return self._router

    def decide(self, query: Query) -> Decision:
        """Return the plan for `query`."""
        prediction = self._router.predict(query.text)
        decision = self._decide(query, prediction)
        if decision.plan != self._safe_plan and any(map(self._is_for_safety, query.earlier)):
            decision = replace(
                decision,
                plan=self._safe_plan,
                reason="an earlier message of the conversation needs the safe plan",
            )
        if not query.explain:
            return decision
        return replace(decision, details=self._details(query, prediction))

    def plans(self) -> Iterable[Plan]:
        """Return each member to choose from, and the safe plan."""
        yield from (self._plans[m] for _, m in self._allowed)
        if self._unfamiliar is not None:
            yield self._unfamiliar

    def _is_for_safety(self, text: str) -> bool:
        return self._decide(Query(text=text), self._router.predict(text)).plan == self._safe_plan

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
                    "expected_usd": float(costs_M[m]),
                }
                for name, m in self._allowed
            ],
            "doubt": self._doubt(prediction),
            "nearest_cluster": self._cluster(prediction),
            "strongest_ngrams": self._ngrams(query.text, prediction, chosen),
            "likeness_logit": self._likeness(prediction, chosen),
        }

    def _quality(self, prediction: Prediction) -> Floats:
        return prediction.quality_M

    def _decide(self, query: Query, prediction: Prediction) -> Decision:
        quality_M = self._quality(prediction)
        allowed: list[float] = quality_M[self._chooser.allowed].tolist()
        scores = dict(zip(self._names, allowed, strict=True))
        if not prediction.familiar:
            return Decision(
                plan=self._safe_plan,
                scores=scores,
                reason=f"unlike the training queries (similarity {prediction.similarity:.2f}, "
                f"familiar from {self._router.doubt.familiar_above:.2f}): the safe plan",
                familiar=False,
            )
        chosen = self._chooser.choose(query, quality_M)
        name = self._router.models[chosen]
        return Decision(
            plan=self._plans[chosen],
            scores=scores,
            reason=f"{name} has the best {self.predictor} quality for its price "
            f"({scores[name]:.2f})",
            familiar=True,
        )

    def _safest(self) -> int:
        """Return the member that left-out tasks recommend, its own mean score where they tie."""
        topics = self._router.topics
        mean_M = topics.sizes_K @ topics.scores_KM
        expected_M = self._router.doubt.left_out_M
        allowed: list[int] = [m for _, m in self._allowed]
        return max(allowed, key=lambda m: (float(expected_M[m]), float(mean_M[m])))

    def _doubt(self, prediction: Prediction) -> dict[str, Any]:
        """Return whether the query is unlike training, and how much its predictions shrank."""
        doubt = self._router.doubt
        trust = 1.0 if prediction.familiar else doubt.trust(prediction.similarity)
        return {
            "familiar": prediction.familiar,
            "similarity": round(prediction.similarity, 4),
            "familiar_above": round(doubt.familiar_above, 4),
            "trust": round(trust, 4),
        }

    def _cluster(self, prediction: Prediction) -> dict[str, Any]:
        topics = self._router.topics
        scores_M = topics.scores_KM[prediction.cluster]
        return {
            "id": prediction.cluster,
            "num_training_queries": int(topics.sizes_K[prediction.cluster]),
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


class Clusters(Learned):
    """Sends each query to the member that did best on the nearest cluster of training queries.

    k-means over the encoder's embeddings, no trained head: the baseline that beats most trained
    routers (the Avengers, see LLMRouterBench). Price, safe plan and explanation as in `Learned`.
    """

    predictor = "mean"

    def _quality(self, prediction: Prediction) -> Floats:
        if not prediction.familiar:
            return prediction.quality_M
        scores_M: Floats = self._router.topics.scores_KM[prediction.cluster]
        return scores_M


class RoutedSettings(Settings):
    """The keys of `kind: learned` and `kind: clusters`."""

    path: str = Field(description="The router's file, relative to the pool.")
    members: Annotated[tuple[Name, ...], Field(strict=False, min_length=1)] | None = Field(
        None, description="The models to choose from; default: all that the router knows."
    )
    unfamiliar: PlanField | None = Field(None, description="The plan for unfamiliar queries.")
    answer_value_usd: float | None = Field(
        None, gt=0, description="What a right answer is worth; default: quality alone counts."
    )


def _build(kind: type[Learned], settings: RoutedSettings, context: BuildContext) -> Policy:
    return kind(
        load_router(context.folder / settings.path),
        models=context.models,
        trade=Trade(answer_value_usd=settings.answer_value_usd, members=settings.members),
        unfamiliar=settings.unfamiliar,
    )


LEARNED = PolicyKind(
    settings=RoutedSettings, build=lambda settings, context: _build(Learned, settings, context)
)
CLUSTERS = PolicyKind(
    settings=RoutedSettings, build=lambda settings, context: _build(Clusters, settings, context)
)
