"""The controller: targets held by a price, limits obeyed, ensembles sized by their worth."""

import random
import threading

import pytest

from policies.base import Decision, ModelFacts, Query
from policies.budget.controller import Controller
from policies.budget.prices import BudgetTarget
from policies.errors import PolicyError
from policies.footprint import Footprint, Limits, Rates
from policies.laws.scaling import EnsembleLaw
from policies.plan import Answer, Cascade, members
from tests.clock import Clock

LAW = EnsembleLaw(L0=0.5, a=0.8, b=0.3)
NAMES = ("m1", "m2", "m3", "m4")


def rates(wh, gco2e_per_wh=0.4):
    """Return rates of a model that needs `wh` per output token."""
    return Rates(
        usd_per_input_token=0.0,
        usd_per_output_token=wh,
        wh_per_output_token=wh,
        gco2e_per_wh=gco2e_per_wh,
        s_per_output_token=wh,
    )


def facts(**wh_per_token):
    """Return models by name, each needing so many Wh per output token."""
    return {name: ModelFacts(name=name, rates=rates(wh)) for name, wh in wh_per_token.items()}


def two_models(clock=None, **options):
    """Return a controller over a small and a ten times larger model."""
    return Controller(
        models=facts(small=0.01, large=0.1),
        clock=clock or Clock(),
        expected_output_tokens=100,
        **options,
    )


def prefers_large(gain):
    """Return a router's decision for the large model, better than the small one by `gain`."""
    return Decision(
        plan=Answer(members=("large",)), scores={"small": 0.9 - gain, "large": 0.9}, reason="test"
    )


def serve(controller, gain, resource="wh"):
    """Answer a request whose router prefers the large model by `gain`; return what was spent."""
    query = Query(text="")
    decision = controller.choose(query, prefers_large(gain))
    spent = 10.0 if members(decision.plan) == ("large",) else 1.0
    controller.observe(query, decision, Footprint(**{resource: spent}))
    return spent


def test_without_targets_and_limits_the_best_prediction_wins():
    """At price zero only quality counts."""
    chosen = two_models().choose(Query(text=""), prefers_large(0.001))
    assert members(chosen.plan) == ("large",)
    assert chosen.details["budget"]["prices"] == {}
    assert chosen.reason == "test; worth its price"


def test_an_hourly_target_is_held_within_a_percent():
    """Over a day of random gains (seed 1), spending meets the target and goes where it helps."""
    rng = random.Random(1)
    clock = Clock()
    controller = two_models(clock, targets=[BudgetTarget(resource="wh", amount=500.0)])
    spent, gains = 0.0, {"small": [], "large": []}
    for number in range(3000):
        clock.now_s = number * 86400 / 3000
        gain = rng.random() * 0.5
        query = Query(text="")
        decision = controller.choose(query, prefers_large(gain))
        [name] = members(decision.plan)
        gains[name].append(gain)
        # Real answers are of any length: the controller learns what they cost on average.
        cost = {"small": 0.01, "large": 0.1}[name] * rng.uniform(20, 160)
        controller.observe(query, decision, Footprint(wh=cost))
        spent += cost
    assert spent == pytest.approx(500 * 24, rel=0.01)
    means = {name: sum(some) / len(some) for name, some in gains.items()}
    assert means["large"] > means["small"] + 0.15
    assert controller.spent()["wh"] == pytest.approx(spent)


def test_a_target_per_thousand_requests_is_held_whatever_the_traffic():
    """Bursts and quiet hours (seed 2) do not change what a request may cost on average."""
    rng = random.Random(2)
    clock = Clock()
    target = BudgetTarget(resource="usd", amount=5000.0, per="1000_requests")
    controller = two_models(clock, targets=[target])
    spent = 0.0
    for _ in range(3000):
        clock.now_s += rng.expovariate(10.0 if rng.random() < 0.5 else 0.05)
        spent += serve(controller, rng.random(), "usd")
    assert spent / 3000 == pytest.approx(5.0, rel=0.02)


def test_requests_that_were_refused_are_worth_no_budget():
    """Three of four are settled at nothing: a thousand of those that ran cost what a target says.

    Seed 4.
    """
    rng = random.Random(4)
    clock = Clock()
    target = BudgetTarget(resource="usd", amount=5000.0, per="1000_requests")
    controller = two_models(clock, targets=[target])
    spent = 0.0
    for number in range(8000):
        clock.now_s += 1.0
        query = Query(text="")
        decision = controller.choose(query, prefers_large(rng.random()))
        if number % 4:
            controller.observe(query, decision, Footprint())
            continue
        cost = Footprint(usd=10.0 if members(decision.plan) == ("large",) else 1.0)
        controller.observe(query, decision, cost)
        spent += cost.usd
    assert spent / 2000 == pytest.approx(5.0, rel=0.02)


def test_two_replicas_that_share_a_record_hold_one_target():
    """Each decides for half of the traffic; together they spend the target (seed 3)."""
    rng = random.Random(3)
    clock = Clock()
    pair = [
        two_models(clock, targets=[BudgetTarget(resource="wh", amount=500.0)]) for _ in range(2)
    ]
    spent = 0.0
    for number in range(3000):
        clock.now_s = number * 86400 / 3000
        controller = rng.choice(pair)
        spent += serve(controller, rng.random() * 0.5)
        if number % 10 == 0:
            for one in pair:
                one.reconcile(num_requests=number + 1, spent={"wh": spent}, first_request_s=0.0)
    assert spent == pytest.approx(500 * 24, rel=0.02)
    assert pair[0].spent()["wh"] == pytest.approx(spent, rel=0.01)


def test_a_restarted_controller_takes_over_what_was_spent():
    """After half a day it owes the rest of the day's budget, not a whole one (seed 5)."""
    rng = random.Random(5)
    clock = Clock(43_200.0)
    controller = two_models(clock, targets=[BudgetTarget(resource="wh", amount=500.0)])
    controller.reconcile(num_requests=1500, spent={"wh": 9000.0}, first_request_s=10.0)
    spent = 9000.0
    for number in range(1500):
        clock.now_s = 43_200 + number * 43_200 / 1500
        spent += serve(controller, rng.random() * 0.5)
    assert spent == pytest.approx(500 * 24, rel=0.02)


def test_a_reserve_is_kept_for_bursts_and_released():
    """Of two even days (seed 7) the second has spent less than half by noon, and all at its end."""
    rng = random.Random(7)
    clock = Clock()
    controller = two_models(clock, targets=[BudgetTarget(resource="wh", amount=500.0)])
    noon, end = 0.0, 0.0
    for number in range(6000):
        clock.now_s = number * 86_400 / 3000
        cost = serve(controller, rng.random() * 0.5)
        if number >= 3000:
            end += cost
            noon += cost if number < 4500 else 0.0
    assert 0.38 * 12_000 < noon < 0.48 * 12_000
    assert end == pytest.approx(12_000, rel=0.01)


def test_a_price_follows_step_by_step():
    """Alarming news at noon does not multiply the price at once, but before it is too late."""
    rng = random.Random(6)
    clock = Clock()
    controller = two_models(clock, targets=[BudgetTarget(resource="wh", amount=500.0)])

    def live(start, end):
        for number in range(start, end):
            clock.now_s = number * 86_400 / 3000
            serve(controller, rng.random() * 0.5)

    live(0, 1500)
    before = controller.prices()["wh"]
    controller.reconcile(num_requests=1500, spent={"wh": 9500.0}, first_request_s=0.0)
    live(1500, 1520)
    assert before < controller.prices()["wh"] < 1.6 * before
    live(1520, 2500)
    assert controller.prices()["wh"] > 1.4 * before


def test_what_still_runs_is_not_forgotten_by_a_record_of_what_ended():
    """The record knows settled requests only; this process adds its running ones."""
    controller = two_models(targets=[BudgetTarget(resource="wh", amount=1e6)])
    controller.choose(Query(text=""), prefers_large(0.5))
    controller.reconcile(num_requests=3, spent={"wh": 7.0}, first_request_s=0.0)
    assert controller.spent()["wh"] == pytest.approx(7.0 + 10.0)


def test_a_slack_target_costs_nothing():
    """Where the best plans fit the target, the price stays zero and nothing is given up."""
    clock = Clock()
    controller = two_models(clock, targets=[BudgetTarget(resource="wh", amount=1e6)])
    for number in range(200):
        clock.now_s = number * 60.0
        decision = controller.choose(Query(text=""), prefers_large(0.001))
        assert members(decision.plan) == ("large",)
    assert controller.prices() == {"wh": 0.0}


def test_carbon_prices_shift_work_to_clean_hours():
    """Live rates that get ten times dirtier make the same gain too dear."""
    models = facts(small=0.01, large=0.1)
    clock = Clock()
    controller = Controller(
        models=models,
        clock=clock,
        targets=[BudgetTarget(resource="gco2e", amount=100.0)],
        expected_output_tokens=100,
    )
    rng = random.Random(4)

    def share_of_large(num):
        taken = 0
        for _ in range(num):
            clock.now_s += 30.0
            decision = controller.choose(Query(text=""), prefers_large(rng.random()))
            taken += members(decision.plan) == ("large",)
        return taken / num

    clean = share_of_large(400)
    for name, fact in models.items():
        dirty = rates(fact.rates.wh_per_output_token, gco2e_per_wh=4.0)
        models[name] = ModelFacts(name=name, rates=dirty)
    assert share_of_large(200) < clean / 3


def test_a_ceiling_follows_the_live_rates():
    """Without any target too: what fitted a ceiling no longer does once the grid is dirtier."""
    models = facts(small=0.01, large=0.1)
    controller = Controller(models=models, clock=Clock())
    query = Query(text="", max_tokens=100, limits=Limits(max_gco2e=5.0))
    assert members(controller.choose(query, prefers_large(0.5)).plan) == ("large",)
    for name, fact in models.items():
        dirty = rates(fact.rates.wh_per_output_token, gco2e_per_wh=0.8)
        models[name] = ModelFacts(name=name, rates=dirty)
    assert members(controller.choose(query, prefers_large(0.5)).plan) == ("small",)


def test_ensembles_grow_until_a_member_no_longer_pays():
    """Members fused at price λ: n* of the law, rounded to a neighbour; more when cheap."""
    clock = Clock()
    models = facts(**dict.fromkeys(NAMES, 0.01))
    scores = dict.fromkeys(NAMES, 0.5)
    chosen = {}
    for amount in (4000.0, 250.0):
        controller = Controller(
            models=models,
            clock=clock,
            targets=[BudgetTarget(resource="wh", amount=amount, per="1000_requests")],
            law=LAW,
            groups=[NAMES],
            expected_output_tokens=100,
        )
        sizes = []
        for _ in range(600):
            clock.now_s += 10.0
            decision = controller.choose(
                Query(text=""), Decision(plan=Answer(members=("m1",)), scores=scores)
            )
            sizes.append(len(members(decision.plan)))
        details = decision.details["budget"]
        chosen[amount] = sum(sizes[100:]) / len(sizes[100:])
        if details["prices"]["wh"]:
            assert abs(details["n_star"] - sizes[-1]) < 1.5
    assert chosen[4000.0] == 4.0
    assert 1.0 <= chosen[250.0] < 1.6


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (Limits(max_gco2e=16.1), 4),
        (Limits(max_gco2e=8.1), 2),
        (Limits(max_wh=10.5), 1),
        (Limits(max_usd=30.5), 3),
        (Limits(max_latency_s=99.0), 4),
    ],
)
def test_a_requests_ceiling_trims_its_ensemble(limits, expected):
    """The largest ensemble whose cost at the most tokens allowed fits the ceiling."""
    controller = Controller(models=facts(**dict.fromkeys(NAMES, 0.1)), clock=Clock(), law=LAW)
    query = Query(text="", max_tokens=100, limits=limits)
    decision = controller.choose(query, Decision(plan=Answer(members=NAMES)))
    assert len(members(decision.plan)) == expected
    assert decision.details["budget"]["unmet"] == []


def test_a_latency_ceiling_follows_what_was_measured():
    """Answers ten times as slow as their model's rates say rule out the slower model."""
    controller = two_models()
    query = Query(text="", max_tokens=100, limits=Limits(max_latency_s=20.0))
    decision = controller.choose(query, prefers_large(0.5))
    assert members(decision.plan) == ("large",)
    for _ in range(20):
        controller.observe(query, decision, Footprint(latency_s=100.0))
    assert members(controller.choose(query, prefers_large(0.5)).plan) == ("small",)
    strict = Query(text="", max_tokens=100, limits=Limits(max_latency_s=0.5))
    refused = controller.choose(strict, prefers_large(0.5))
    assert refused.details["budget"]["unmet"] == ["max_latency_s"]


def test_a_ceiling_below_the_cheapest_plan_is_reported():
    """The cheapest plan comes back, with the limit that it breaks, for the router to refuse."""
    query = Query(text="", max_tokens=100, limits=Limits(max_usd=0.5))
    decision = two_models().choose(query, prefers_large(0.1))
    assert members(decision.plan) == ("small",)
    assert decision.details["budget"]["unmet"] == ["max_usd"]
    assert "no plan meets max_usd" in decision.reason


def test_a_cascade_that_does_not_fit_is_cut():
    """Its cost is that of all stages; the best stage that fits alone is taken."""
    cascade = Cascade(
        stages=(Answer(members=("small",)), Answer(members=("large",))), thresholds=(0.5,)
    )
    query = Query(text="", max_tokens=100, limits=Limits(max_wh=10.5))
    decision = two_models().choose(
        query, Decision(plan=cascade, scores={"small": 0.5, "large": 0.9})
    )
    assert decision.plan == Answer(members=("large",))


def test_a_quality_floor_overrides_the_price():
    """However dear, a plan below the floor is not taken while one above it exists."""
    clock = Clock()
    controller = two_models(clock, targets=[BudgetTarget(resource="wh", amount=1.0)])
    for _ in range(100):
        clock.now_s += 1.0
        controller.choose(Query(text=""), prefers_large(0.2))
    assert members(controller.choose(Query(text=""), prefers_large(0.2)).plan) == ("small",)
    floor = Query(text="", limits=Limits(quality_floor=0.8))
    assert members(controller.choose(floor, prefers_large(0.2)).plan) == ("large",)
    high = Query(text="", limits=Limits(quality_floor=0.95))
    decision = controller.choose(high, prefers_large(0.2))
    assert members(decision.plan) == ("large",)
    assert decision.details["budget"]["unmet"] == ["quality_floor"]


def test_the_stricter_of_the_policys_and_the_requests_limits_holds():
    """A request cannot lift what the policy was configured with."""
    controller = two_models(limits=Limits(max_wh=5.0, quality_floor=0.1))
    for own in (Limits(), Limits(max_wh=50.0), Limits(max_usd=50.0)):
        query = Query(text="", max_tokens=100, limits=own)
        assert members(controller.choose(query, prefers_large(0.1)).plan) == ("small",)


def test_a_request_that_never_ran_is_refunded():
    """What is committed at the estimate is settled at the measured cost, here nothing."""
    controller = two_models(targets=[BudgetTarget(resource="wh", amount=1.0)])
    query = Query(text="")
    decision = controller.choose(query, prefers_large(0.1))
    assert controller.spent()["wh"] == pytest.approx(10.0)
    controller.observe(query, decision, Footprint())
    assert controller.spent()["wh"] == pytest.approx(0.0)


def test_many_threads_lose_no_spending():
    """Eight threads choose and settle at once; the sum is exact."""
    controller = two_models(targets=[BudgetTarget(resource="wh", amount=1e9)])

    def work():
        for _ in range(100):
            query = Query(text="")
            decision = controller.choose(query, prefers_large(0.1))
            controller.observe(query, decision, Footprint(wh=1.0))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert controller.spent()["wh"] == pytest.approx(800.0)


def test_one_resource_has_one_target():
    """Two targets for the same resource contradict each other."""
    target = BudgetTarget(resource="wh", amount=1.0)
    with pytest.raises(PolicyError, match="each resource at most once"):
        two_models(targets=[target, target])


def test_a_wrong_guess_of_lengths_does_not_rule_out_what_was_never_chosen():
    """Answers a tenth as long as guessed make every model cheaper, not only those in use."""
    clock = Clock()
    controller = two_models(clock, targets=[BudgetTarget(resource="wh", amount=1e6)])
    query = Query(text="")
    for _ in range(50):
        decision = controller.choose(query, prefers_large(0.5))
        controller.observe(query, decision, Footprint(wh=1.0))
    decision = controller.choose(
        query, Decision(plan=Answer(members=("small",)), scores={"small": 0.9, "large": 0.1})
    )
    assert members(decision.plan) == ("small",)
    assert decision.details["budget"]["expected"]["wh"] == pytest.approx(0.1, rel=0.05)
