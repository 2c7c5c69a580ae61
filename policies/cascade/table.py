"""From outcomes that hold real generations to the table that a cascade learns from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from policies.cascade.chains import Floats
from policies.cascade.predictions import AnswerTable, first_members
from policies.errors import OutcomesError
from policies.footprint import Rates, estimate
from policies.outcomes import Outcome
from policies.plan import Plan


def answer_table(
    outcomes: Sequence[Outcome],
    plans: Mapping[str, Plan],
    rates: Mapping[str, Rates],
    top: Mapping[str, int] = MappingProxyType({}),
) -> tuple[AnswerTable, Floats]:
    """Return the answers of the stages `plans` (by their names in the outcomes), and their costs.

    Costs, [Q, S] in US dollars, are the outcomes' own or else the tokens' price at `rates`, of a
    fusion in `top` that of so many of its members.
    Raises `OutcomesError` naming the query and what it lacks: a cascade needs every stage's score,
    text and log-probabilities for every query.
    """
    if not outcomes:
        raise OutcomesError("a cascade needs outcomes, got none")
    for number, outcome in enumerate(outcomes, start=1):
        where = f"outcome {outcome.id or number}"
        for name in plans:
            for what in ("scores", "outputs", "logprobs"):
                if name not in getattr(outcome, what):
                    raise OutcomesError(
                        f"{where}: {what} lacks {name!r}; a cascade learns from real generations "
                        "of every stage"
                    )
    shape = (len(outcomes), len(plans))

    def column(values: Sequence[Sequence[float]]) -> Floats:
        return np.array(values, np.float64).reshape(shape)

    table = AnswerTable(
        plans=dict(plans),
        queries=tuple(outcome.query for outcome in outcomes),
        answers=tuple(tuple(outcome.outputs[name] for outcome in outcomes) for name in plans),
        logprob_mean_QS=column([[o.logprobs[name].mean for name in plans] for o in outcomes]),
        logprob_min_QS=column([[o.logprobs[name].min for name in plans] for o in outcomes]),
        num_tokens_QS=column([[o.logprobs[name].num_tokens for name in plans] for o in outcomes]),
        quality_QS=column([[o.scores[name] for name in plans] for o in outcomes]),
        entropy_mean_QS=column([[_entropy(o, name) for name in plans] for o in outcomes]),
        top=dict(top),
    )
    priced = {name: first_members(plan, top.get(name)) for name, plan in plans.items()}
    cost = [[_usd(o, name, plan, rates) for name, plan in priced.items()] for o in outcomes]
    return table, column(cost)


def _entropy(outcome: Outcome, name: str) -> float:
    entropy = outcome.logprobs[name].entropy
    return float("nan") if entropy is None else entropy


def _usd(outcome: Outcome, name: str, plan: Plan, rates: Mapping[str, Rates]) -> float:
    if name in outcome.costs:
        return outcome.costs[name]
    return estimate(
        plan,
        rates,
        prompt_tokens=outcome.prompt_tokens or 0,
        output_tokens=outcome.output_tokens.get(name, outcome.logprobs[name].num_tokens),
    ).usd
