"""Real answers as a table, and what a scorer says of all of them at once.

`Predictions` is the vectorised view of `LearnedScorer`: the threshold search and offline
evaluation use it, requests do not.

Shape legend: Q queries, S stages, E earlier stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from policies.cascade.base import Attempt, normalise
from policies.cascade.scorer import NUM_OWN_SIGNALS, LearnedScorer, ScorerWeights, logit
from policies.errors import OutcomesError
from policies.footprint import Rates, estimate
from policies.outcomes import AnswerLogprobs, Outcome
from policies.plan import Answer, Plan

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.intp]
Rows: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class AnswerTable:
    """Real answers of S stages to Q queries, and whether they were right (quality in [0, 1]).

    Of the fusions in `top`, so many members made the answer; which ones depended on the query.
    """

    plans: Mapping[str, Plan]  # S stages by name, in order
    queries: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]  # [S][Q]
    logprob_mean_QS: Floats
    logprob_min_QS: Floats
    num_tokens_QS: Floats
    quality_QS: Floats
    entropy_mean_QS: Floats | None = None  # NaN, or no table at all, where nobody knows
    top: Mapping[str, int] = field(default_factory=dict)

    def attempt(self, query: int, stage: int) -> Attempt:
        """Return the answer of `stage` to `query`, as if no other stage had answered."""
        name, plan = tuple(self.plans.items())[stage]
        entropy = np.nan if self.entropy_mean_QS is None else self.entropy_mean_QS[query, stage]
        return Attempt(
            query=self.queries[query],
            plan=first_members(plan, self.top.get(name)),
            answer=self.answers[stage][query],
            logprob_mean=float(self.logprob_mean_QS[query, stage]),
            logprob_min=float(self.logprob_min_QS[query, stage]),
            num_tokens=int(self.num_tokens_QS[query, stage]),
            entropy_mean=None if np.isnan(entropy) else float(entropy),
        )

    def answer_ids(self) -> Ints:
        """Return [Q, S] ids: equal within a row where the normalised answers are equal."""
        ids = np.empty((len(self.queries), len(self.plans)), np.intp)
        for q in range(len(self.queries)):
            seen: dict[str, int] = {}
            for s in range(len(self.plans)):
                ids[q, s] = seen.setdefault(normalise(self.answers[s][q]), len(seen))
        return ids


def answer_table(
    outcomes: Sequence[Outcome],
    plans: Mapping[str, Plan],
    rates: Mapping[str, Rates],
    top: Mapping[str, int] = MappingProxyType({}),
) -> tuple[AnswerTable, Floats]:
    """Return the answers of the stages `plans` (by their names in the outcomes), and their costs.

    Costs, [Q, S] in US dollars, are the outcomes' own or else the tokens' price at `rates`, of a
    fusion in `top` that of so many of its members. Outcomes that lack a stage's score or text are
    left out. Log-probabilities that nobody told are 0, as they are in serving.
    Raises `OutcomesError` where no outcome is left, naming what the first one lacks.
    """
    if not outcomes:
        raise OutcomesError("a cascade needs outcomes, got none")
    lacks = [_lacking(outcome, plans) for outcome in outcomes]
    if all(lacks):
        raise OutcomesError(
            f"no outcome is complete: outcome {outcomes[0].id or 1}: {lacks[0]}; a cascade learns "
            "from real generations of every stage"
        )
    outcomes = [outcome for outcome, lack in zip(outcomes, lacks, strict=True) if not lack]
    logprobs = [[_logprobs(outcome, name) for name in plans] for outcome in outcomes]
    shape = (len(outcomes), len(plans))

    def column(values: Sequence[Sequence[float]]) -> Floats:
        return np.array(values, np.float64).reshape(shape)

    table = AnswerTable(
        plans=dict(plans),
        queries=tuple(outcome.query for outcome in outcomes),
        answers=tuple(tuple(outcome.outputs[name] for outcome in outcomes) for name in plans),
        logprob_mean_QS=column([[seen.mean for seen in row] for row in logprobs]),
        logprob_min_QS=column([[seen.min for seen in row] for row in logprobs]),
        num_tokens_QS=column([[seen.num_tokens for seen in row] for row in logprobs]),
        quality_QS=column([[o.scores[name] for name in plans] for o in outcomes]),
        entropy_mean_QS=column(
            [[np.nan if seen.entropy is None else seen.entropy for seen in row] for row in logprobs]
        ),
        top=dict(top),
    )
    priced = {name: first_members(plan, top.get(name)) for name, plan in plans.items()}
    cost = [[_usd(o, name, plan, rates) for name, plan in priced.items()] for o in outcomes]
    return table, column(cost)


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a scorer says of a table.

    `prior_QS` is P(correct | query). `raw_QS` is the calibrated logit of the score when no
    earlier stage answered; `context_QS2` what "an earlier stage answered" and the share of equal
    answers add to it.
    """

    prior_QS: Floats
    raw_QS: Floats
    context_QS2: Floats
    answer_QS: Ints

    def score_of(self, stage_Q: Ints, earlier_QE: Ints, ran_QE: Rows) -> Floats:
        """Return the score of stage `stage_Q[q]` for each query q.

        `earlier_QE` are the stages before it, which may differ by query as well; `ran_QE` says
        which of them ran (were not skipped).
        """
        at_Q1 = stage_Q[:, None]
        logit_Q: Floats = np.take_along_axis(self.raw_QS, at_Q1, axis=1)[:, 0]
        if earlier_QE.shape[1]:
            mine_Q1 = np.take_along_axis(self.answer_QS, at_Q1, axis=1)
            same_QE = np.take_along_axis(self.answer_QS, earlier_QE, axis=1) == mine_Q1
            num_Q = ran_QE.sum(axis=1)
            share_Q = (same_QE & ran_QE).sum(axis=1) / np.maximum(num_Q, 1)
            context_Q2 = self.context_QS2[np.arange(stage_Q.size), stage_Q]
            logit_Q = logit_Q + (num_Q > 0) * context_Q2[:, 0] + share_Q * context_Q2[:, 1]
        score_Q: Floats = expit(logit_Q)
        return score_Q


def predict(weights: ScorerWeights, table: AnswerTable) -> Predictions:
    """Score every answer of `table`, through the same code that serves requests."""
    scorer = LearnedScorer(weights, table.plans, table.top)
    names = tuple(table.plans)
    rows = [weights.stages.index(name) for name in names]
    shape = table.quality_QS.shape
    prior_QS, raw_QS = np.empty(shape), np.empty(shape)
    for q, query in enumerate(table.queries):
        priors = scorer.priors(query)
        prior_QS[q] = [priors[name] for name in names]
        raw_QS[q] = [logit(scorer.score(table.attempt(q, s))) for s in range(len(names))]
    context_S2 = weights.slope_S[rows, None] * weights.dense_SF[rows, NUM_OWN_SIGNALS:]
    return Predictions(
        prior_QS=prior_QS,
        raw_QS=raw_QS,
        context_QS2=np.broadcast_to(context_S2, (*shape, 2)),
        answer_QS=table.answer_ids(),
    )


def first_members(plan: Plan, size: int | None) -> Plan:
    """Return the fusion `plan` with `size` members (None: all), whichever: scorers see no more."""
    if size is None or not isinstance(plan, Answer):
        return plan
    return replace(plan, members=plan.members[:size])


def _lacking(outcome: Outcome, plans: Mapping[str, Plan]) -> str:
    """Return what a stage's answer lacks in `outcome`; empty where it is complete."""
    for name in plans:
        for what in ("scores", "outputs"):
            if name not in getattr(outcome, what):
                return f"{what} lacks {name!r}"
    return ""


def _logprobs(outcome: Outcome, name: str) -> AnswerLogprobs:
    known = outcome.logprobs.get(name)
    num_tokens = outcome.output_tokens.get(name, 0)
    return known or AnswerLogprobs(mean=0.0, min=0.0, num_tokens=num_tokens)


def _usd(outcome: Outcome, name: str, plan: Plan, rates: Mapping[str, Rates]) -> float:
    if name in outcome.costs:
        return outcome.costs[name]
    return estimate(
        plan,
        rates,
        prompt_tokens=outcome.prompt_tokens or 0,
        output_tokens=outcome.output_tokens.get(name, _logprobs(outcome, name).num_tokens),
    ).usd
