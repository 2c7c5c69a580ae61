"""The learned cascade on made-up answers: scorer, calibration, frontier, file and policy."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from policies.base import Decision, Policy, Query, members_of
from policies.cascade.answers import AnswerTable, predict
from policies.cascade.base import Attempt, Scorer
from policies.cascade.fit import fit_stopping
from policies.cascade.learn import learn_cascade, measure_stops, replay_cascade
from policies.cascade.learned import (
    ROUTED,
    CascadePoint,
    LearnedCascade,
    load_cascade,
    within_budget,
)
from policies.cascade.scorer import LearnedScorer
from policies.errors import PolicyError
from policies.frugal import Frugal
from policies.plan import Answer, Cascade, Plan, members
from tests.policies.cascade.cascade_world import answer_table, costs


@pytest.fixture(scope="module")
def held_out() -> AnswerTable:
    """Answers that no training sees (seed 1)."""
    return answer_table(1, 400)


@pytest.fixture(scope="module")
def cascade() -> LearnedCascade:
    """A cascade learned on 400 queries (seed 0) at half the base's cost."""
    table = answer_table(0, 400)
    return learn_cascade(table, costs(table), budget=3.0, routed=("sum", "date", "list"))


def test_held_out_scores_are_calibrated(cascade: LearnedCascade, held_out: AnswerTable) -> None:
    """Among held-out answers scored about p, a share of about p is right."""
    predictions = predict(cascade.weights, held_out)
    score = 1 / (1 + np.exp(-predictions.raw_QS.ravel()))
    right = held_out.quality_QS.ravel()
    bins = np.minimum((score * 10).astype(int), 9)
    error = sum(
        abs(score[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean()
        for b in range(10)
        if (bins == b).any()
    )
    assert error < 0.05


def test_an_answer_tells_more_than_its_query(
    cascade: LearnedCascade, held_out: AnswerTable
) -> None:
    """The scorer's held-out log loss is below the prior's, and that below a constant's."""
    predictions = predict(cascade.weights, held_out)
    right = held_out.quality_QS

    def log_loss(probability: np.ndarray) -> float:
        kept = np.clip(probability, 1e-6, 1 - 1e-6)
        return float(-np.mean(right * np.log(kept) + (1 - right) * np.log(1 - kept)))

    score = 1 / (1 + np.exp(-predictions.raw_QS))
    constant = np.broadcast_to(right.mean(axis=0), right.shape)
    assert log_loss(score) < log_loss(predictions.prior_QS) < log_loss(constant)


def test_the_frontier_holds_on_held_out_answers(
    cascade: LearnedCascade, held_out: AnswerTable
) -> None:
    """At half the base's cost the chosen chain beats the base on queries it never saw."""
    point = cascade.frontier[cascade.chosen]
    [run] = replay_cascade(cascade, held_out, costs(held_out), [point])
    assert ROUTED in point.stages
    assert run.cost_Q.mean() < 3.3
    assert run.quality_Q.mean() > held_out.quality_QS[:, 3].mean()
    assert run.quality_Q.mean() == pytest.approx(point.accuracy, abs=0.04)


def run_plan(
    plan: Plan, scorers: dict[str, Scorer], table: AnswerTable, q: int
) -> tuple[float, float]:
    """Run a policy's plan the way the executor does: (quality, cost)."""
    stages = plan.stages if isinstance(plan, Cascade) else (plan,)
    cost, earlier = 0.0, []
    for j, stage in enumerate(stages):
        s = list(table.plans.values()).index(stage)
        cost += costs(table)[q, s]
        attempt = replace(table.attempt(q, s), earlier=tuple(earlier))
        if not isinstance(plan, Cascade) or j == len(stages) - 1:
            break
        if scorers[plan.scorer].score(attempt) >= plan.thresholds[j]:
            break
        earlier.append(attempt.answer)
    return float(table.quality_QS[q, s]), cost


@pytest.mark.parametrize("budget", [1.2, 2.0, 3.0, 5.0])
def test_serving_equals_the_replay(
    cascade: LearnedCascade, held_out: AnswerTable, budget: float
) -> None:
    """The policy's plans, run stage by stage with its scorer, do what the replay says."""
    policy = Frugal(cascade, budget_usd=budget)
    [run] = replay_cascade(cascade, held_out, costs(held_out), [policy.point])
    scorers = {"cascade": policy.scorer}
    for q in range(100):
        decision = policy.decide(Query(text=held_out.queries[q]))
        quality, cost = run_plan(decision.plan, scorers, held_out, q)
        assert (quality, cost) == (run.quality_Q[q], pytest.approx(run.cost_Q[q]))


def test_the_file_gives_the_same_cascade(cascade: LearnedCascade, tmp_path: Path) -> None:
    """A saved cascade decides and scores as before; the file holds no pickles."""
    file = tmp_path / "cascade.npz"
    cascade.save(file)
    loaded = load_cascade(file)
    assert (loaded.plans, loaded.frontier) == (cascade.plans, cascade.frontier)
    assert (loaded.top, loaded.prior_power) == (cascade.top, cascade.prior_power)
    query = Query(text="date of 12 and 7")
    assert Frugal(loaded).decide(query) == Frugal(cascade).decide(query)
    assert [path.name for path in tmp_path.iterdir()] == ["cascade.npz"]


@pytest.mark.parametrize("content", [b"", b"PK not a zip", b"\x93NUMPY"])
def test_a_broken_file_is_named(content: bytes, tmp_path: Path) -> None:
    """A file that is no cascade is refused by its name."""
    file = tmp_path / "broken.npz"
    file.write_bytes(content)
    with pytest.raises(PolicyError, match=r"broken\.npz"):
        load_cascade(file)


def test_what_no_stage_knows_goes_elsewhere(cascade: LearnedCascade) -> None:
    """A plan of `outside` runs where it names a model that no stage has, and nowhere else."""

    class Elsewhere(Policy):
        """Gives towns to a guide, and everything else to a stage of the cascade."""

        def decide(self, query: Query) -> Decision:
            return Decision(plan=Answer(members=("guide" if "town" in query.text else "sum",)))

        def plans(self) -> list[Plan]:
            return [Answer(members=("guide",)), Answer(members=("sum",))]

    policy, alone = Frugal(cascade, outside=Elsewhere()), Frugal(cascade)
    assert policy.decide(Query(text="which town is it")).plan == Answer(members=("guide",))
    query = Query(text="date of 12 and 7")
    assert policy.decide(query) == alone.decide(query)
    assert set(members_of(policy)) == {*members_of(alone), "guide"}


def test_the_budget_moves_along_the_frontier(cascade: LearnedCascade) -> None:
    """A larger budget never lowers the expected accuracy; an unaffordable one is refused."""
    points = [Frugal(cascade, budget_usd=budget).point for budget in (1.01, 1.5, 2.5, 6.0)]
    accuracies = [point.accuracy for point in points]
    assert accuracies == sorted(accuracies)
    with pytest.raises(PolicyError, match="below the cheapest"):
        Frugal(cascade, budget_usd=0.5)


def test_gated_and_repeated_stages_leave_the_plan(cascade: LearnedCascade) -> None:
    """A stage below its gate, or repeated by a later one, isn't in the plan."""

    def only(stages: tuple[str, ...], gate: float) -> Frugal:
        point = CascadePoint(
            stages=stages, thresholds=(0.5,), gates=(gate,), accuracy=0.5, cost=1.0
        )
        return Frugal(replace(cascade, frontier=(point,), chosen=0))

    query = Query(text="sum of 3 and 4")
    base, own = Answer(members=("base",)), Answer(members=("sum",))
    assert only(("date", "base"), 0.5).decide(query).plan == base
    assert "skipped date" in only(("date", "base"), 0.5).decide(query).reason
    assert only((ROUTED, "sum"), 0.0).decide(query).plan == own
    plan = only((ROUTED, "base"), 0.0).decide(query).plan
    assert plan == Cascade(stages=(own, base), thresholds=(0.5,), scorer="cascade")


def test_members_are_all_that_a_query_may_meet(cascade: LearnedCascade) -> None:
    """A policy with a routed stage names every model that the stage may become."""
    assert set(members_of(Frugal(cascade))) >= {"sum", "date", "list"}


def test_agreement_raises_the_score(cascade: LearnedCascade, held_out: AnswerTable) -> None:
    """The same answer from an earlier stage makes the base's answer more likely right."""
    scorer = LearnedScorer(cascade.weights, cascade.plans)
    alone = held_out.attempt(0, 3)
    agreed = replace(alone, earlier=(alone.answer,))
    contradicted = replace(alone, earlier=("something else",))
    assert scorer.score(agreed) > scorer.score(contradicted)


def test_any_text_and_plan_can_be_scored(cascade: LearnedCascade) -> None:
    """Odd texts, infinite log-probabilities and plans never seen still give a probability."""
    scorer = LearnedScorer(cascade.weights, cascade.plans)
    for text in ("", " ", "\x00", "ünï 漢字 🐟", "9" * 5000):
        attempt = Attempt(
            query=text,
            plan=Answer(members=("stranger",)),
            answer=text,
            logprob_mean=-np.inf,
            logprob_min=-np.inf,
            num_tokens=0,
        )
        assert 0 <= scorer.score(attempt) <= 1


def test_a_budget_is_met_on_the_training_answers() -> None:
    """The chosen point is the best within the budget (seed 5, 80 queries)."""
    table = answer_table(5, 80)
    cascade = learn_cascade(table, costs(table), budget=2.0)
    assert cascade.frontier[cascade.chosen] == within_budget(cascade.frontier, 2.0)


def test_an_unknown_routed_stage_is_named() -> None:
    """A routed stage that no answers exist for is refused with what there is."""
    table = answer_table(5, 80)
    with pytest.raises(PolicyError, match=r"'poet' is unknown; allowed are sum, date, list, base"):
        learn_cascade(table, costs(table), budget=2.0, routed=("sum", "poet"))


def test_the_ranker_beats_the_average_candidate(
    cascade: LearnedCascade, held_out: AnswerTable
) -> None:
    """Of all stages' held-out answers, the one that wins its pairs is right most often."""
    ranker = LearnedScorer(cascade.weights, cascade.plans)
    right = []
    for q in range(len(held_out.queries)):
        shares = ranker.rank([held_out.attempt(q, s) for s in range(4)])
        assert sum(shares) == pytest.approx(2.0)
        right.append(held_out.quality_QS[q, int(np.argmax(shares))])
    assert np.mean(right) > held_out.quality_QS.mean(axis=0).max()
    assert ranker.rank([held_out.attempt(0, 0)]) == [1.0]


def test_a_growing_answers_ceiling_only_falls(
    cascade: LearnedCascade, held_out: AnswerTable
) -> None:
    """Token by token, whatever they are, the bound of the final score never rises (seed 2)."""
    scorer = LearnedScorer(cascade.weights, cascade.plans)
    rng = np.random.default_rng(2)
    for q in range(20):
        logprobs = -rng.exponential(rng.choice([0.1, 3.0]), 12)
        bounds = [
            scorer.ceiling(
                replace(
                    held_out.attempt(q, q % 4),
                    logprob_mean=float(logprobs[:size].mean()),
                    logprob_min=float(logprobs[:size].min()),
                    num_tokens=size,
                    finished=False,
                ),
                max_tokens=12,
            )
            for size in range(1, 13)
        ]
        assert bounds == sorted(bounds, reverse=True)


def test_acceptable_answers_are_hardly_ever_stopped(cascade: LearnedCascade) -> None:
    """On 4,000 fresh answers at most 2% of the accepted ones are stopped, and some rejected ones.

    The cuts promise 1% on average over training sets; seed 7.
    """
    fresh = answer_table(7, 4000)
    point = replace(cascade.frontier[0], stages=("sum", "base"), thresholds=(0.6,), gates=(0.0,))
    [rate] = measure_stops(cascade, fresh, point)
    assert rate.num_accepted + rate.num_rejected == 4000
    assert rate.num_false_stops <= 0.02 * rate.num_accepted
    assert rate.num_right_stops > 0.2 * rate.num_rejected


def with_fusion(table: AnswerTable, top: dict[str, int]) -> AnswerTable:
    """Add a stage that fuses the specialists, right where one of them is, and says so."""
    right = table.quality_QS[:, :3].max(axis=1)
    plan = Answer(members=tuple(list(table.plans)[:3]), weighting="evidence")
    return replace(
        table,
        plans={**table.plans, "pair": plan},
        answers=(*table.answers, tuple("right" if one else "wrong" for one in right)),
        logprob_mean_QS=np.column_stack([table.logprob_mean_QS, -0.1 - 1.5 * (1 - right)]),
        logprob_min_QS=np.column_stack([table.logprob_min_QS, -0.2 - 3 * (1 - right)]),
        num_tokens_QS=np.column_stack([table.num_tokens_QS, np.full(len(right), 4.0)]),
        top=top,
        quality_QS=np.column_stack([table.quality_QS, right]),
    )


def test_a_fused_stage_takes_the_likeliest_members() -> None:
    """Where it pays, the learner ends with the fusion; serving runs its best members by prior.

    The scorer knows the fusion whichever members it has. Seed 0, 400 queries.
    """
    table = with_fusion(answer_table(0, 400), {"pair": 2})
    price = np.column_stack([costs(table), np.full(400, 2.0)])
    cascade = learn_cascade(
        table, price, budget=2.5, routed=("sum", "date", "list"),
        prior_power=2.0, last=["pair"],
    )  # fmt: skip
    assert {point.stages[-1] for point in cascade.frontier} == {"pair"}
    policy = Frugal(cascade)
    plan = policy.decide(Query(text="date of 3 and 4")).plan
    last = plan.stages[-1] if isinstance(plan, Cascade) else plan
    assert isinstance(last, Answer)
    assert len(last.members) == 2
    assert last.members[0] == "date"
    assert last.weights is not None
    assert last.weights[0] > last.weights[1]
    scorer = policy.scorer
    whole = table.attempt(0, 4)
    for pair in (("date", "sum"), ("list", "sum")):
        reduced = replace(whole, plan=Answer(members=pair, weighting="evidence"))
        assert scorer.score(reduced) == scorer.score(whole)
    assert set(members(plan)) <= set(members_of(policy))


@pytest.mark.parametrize(("name", "size"), [("sum", 2), ("pair", 1), ("pair", 4), ("nobody", 2)])
def test_a_senseless_top_is_refused(name: str, size: int) -> None:
    """Only a fusion can leave members out, and it keeps two at least."""
    table = with_fusion(answer_table(0, 40), {name: size})
    price = np.column_stack([costs(table), np.full(40, 2.0)])
    with pytest.raises(PolicyError, match=f"stage '{name}'"):
        learn_cascade(table, price, budget=9.0)


def test_stages_have_the_time_they_are_given(cascade: LearnedCascade) -> None:
    """A time per stage goes into every plan of several stages."""
    point = CascadePoint(
        stages=("date", "base"), thresholds=(0.5,), gates=(0.0,), accuracy=0.5, cost=1.0
    )
    policy = Frugal(replace(cascade, frontier=(point,), chosen=0), stage_timeout_s=3.0)
    plan = policy.decide(Query(text="date of 1 and 2")).plan
    assert isinstance(plan, Cascade)
    assert plan.timeouts_s == (3.0,)


@pytest.mark.parametrize("seed", range(20))
def test_signals_that_hardly_differ_are_fitted_without_a_warning(seed: int) -> None:
    """Answers of one length, say: a column that says nothing gets a weight that is a number."""
    dice = np.random.default_rng(seed)
    falling_NP = np.c_[np.ones(40), dice.random(40), np.full(40, -1.0), -dice.random(40)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights_P, _ = fit_stopping(falling_NP, dice.normal(size=40))
    assert np.isfinite(weights_P).all() and (weights_P[2:] >= 0).all()
