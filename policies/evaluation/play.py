"""A policy's plans played on stored answers: whose answer it would have given, and at what cost.

Single answers, cascades and best-of are played exactly; a fusion only where its own answer is
among the outcomes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from policies.base import Policy, Query
from policies.best import rate
from policies.cascade.base import Attempt, PromptScorer, Reading, Readings, Scorer
from policies.errors import OutcomesError
from policies.footprint import Rates
from policies.outcomes import AnswerLogprobs, Outcome
from policies.plan import Answer, Best, Cascade, Plan, members

NameOf = Callable[[Answer, Outcome], str]
"""Under which name the outcomes hold what an `Answer` wrote."""


@dataclass(frozen=True, kw_only=True)
class Played:
    """Whose answer a query got (by its name in the outcome), how good it was, and its cost.

    `used` are the members that ran and the tokens that each wrote; `usd` is None where the prompt's
    length or a member's rate is not known.
    """

    name: str
    quality: float
    usd: float | None
    used: tuple[tuple[str, int], ...]


def single(answer: Answer, _: Outcome) -> str:
    """Return the member's name; raises `OutcomesError` for a fusion, whose answer nobody knows."""
    if len(answer.members) > 1:
        raise OutcomesError(
            "outcomes hold single models' answers, and the plan combines several; nothing is known "
            "of the answer it would give"
        )
    return answer.members[0]


def play(
    policy: Policy,
    outcome: Outcome,
    *,
    rates: Mapping[str, Rates],
    scorers: Mapping[str, Scorer],
    name_of: NameOf = single,
    readings: Readings = MappingProxyType({}),
) -> Played:
    """Return what `policy` would have done with the outcome's query.

    Raises `OutcomesError` where its plan needs an answer or a score that the outcome lacks.
    """
    query = Query(text=outcome.query, prompt_tokens=outcome.prompt_tokens or 0)
    game = _Game(outcome, scorers, name_of, readings)
    name = game.play(policy.decide(query).plan).name
    if name not in outcome.scores:
        raise _lacks(outcome, name, "score")
    costs = [_usd(outcome, names, tokens, rates) for names, tokens in game.ran]
    known = [usd for usd in costs if usd is not None]
    return Played(
        name=name,
        quality=outcome.scores[name],
        usd=sum(known) if len(known) == len(costs) else None,
        used=tuple((name, tokens or 0) for names, tokens in game.ran for name in names),
    )


@dataclass(frozen=True, kw_only=True)
class _Given:
    """An answer by its name in the outcome, and the plan that it comes from."""

    name: str
    plan: Plan


@dataclass
class _Game:
    outcome: Outcome
    scorers: Mapping[str, Scorer]
    name_of: NameOf
    readings: Readings
    # What ran, and how many tokens it wrote; None where it only read the prompt.
    ran: list[tuple[tuple[str, ...], int | None]] = field(default_factory=list)

    def play(self, plan: Plan, earlier: tuple[str, ...] = ()) -> _Given:
        """Return the answer that `plan` ends with."""
        if isinstance(plan, Answer):
            name = self.name_of(plan, self.outcome)
            self.ran.append((plan.members, _num_tokens(self.outcome, name)))
            return _Given(name=name, plan=plan)
        return self._cascade(plan, earlier) if isinstance(plan, Cascade) else self._best(plan)

    def _cascade(self, plan: Cascade, earlier: tuple[str, ...]) -> _Given:
        scorer = self.scorers[plan.scorer]
        for stage, threshold in zip(plan.stages, plan.thresholds, strict=False):
            if isinstance(scorer, PromptScorer):
                if scorer.foresee(self.outcome.query, stage, self._reading(stage)) >= threshold:
                    return self.play(stage, earlier)
                self.ran.append((members(stage), None))
                continue
            attempt = self._attempt(given := self.play(stage, earlier), earlier)
            if scorer.score(attempt) >= threshold:
                return given
            earlier = (*earlier, attempt.answer)
        return self.play(plan.stages[-1], earlier)

    def _best(self, plan: Best) -> _Given:
        given = [self.play(candidate) for candidate in plan.candidates]
        scores = rate(plan, [self._attempt(one, ()) for one in given], self.scorers)
        return given[max(range(len(given)), key=scores.__getitem__)]

    def _reading(self, stage: Plan) -> Reading | None:
        [name] = members(stage)
        return self.readings.get(name, {}).get(self.outcome.query)

    def _attempt(self, given: _Given, earlier: tuple[str, ...]) -> Attempt:
        if given.name not in self.outcome.outputs:
            raise _lacks(self.outcome, given.name, "output")
        known = self.outcome.logprobs.get(given.name)
        # As serving has it where an engine tells no log-probabilities.
        seen = known or AnswerLogprobs(
            mean=0.0, min=0.0, num_tokens=_num_tokens(self.outcome, given.name)
        )
        return Attempt(
            query=self.outcome.query,
            plan=given.plan,
            answer=self.outcome.outputs[given.name],
            logprob_mean=seen.mean,
            logprob_min=seen.min,
            num_tokens=seen.num_tokens,
            entropy_mean=seen.entropy,
            earlier=earlier,
        )


def _num_tokens(outcome: Outcome, name: str) -> int:
    if name in outcome.output_tokens:
        return outcome.output_tokens[name]
    return outcome.logprobs[name].num_tokens if name in outcome.logprobs else 0


def _usd(
    outcome: Outcome, ran: tuple[str, ...], num_tokens: int | None, rates: Mapping[str, Rates]
) -> float | None:
    if len(ran) == 1 and ran[0] in outcome.costs and num_tokens is not None:
        return outcome.costs[ran[0]]
    if outcome.prompt_tokens is None or not all(name in rates for name in ran):
        return None
    return sum(rates[name].footprint(outcome.prompt_tokens, num_tokens or 0).usd for name in ran)


def _lacks(outcome: Outcome, name: str, what: str) -> OutcomesError:
    return OutcomesError(
        f"the model {name!r} has no {what} for {outcome.id or outcome.query[:40]!r}; nothing is "
        "known of the answer it would give"
    )
