"""A look at what a cheap model makes of a prompt tells, where the text does not, who should answer.

The questions' texts say nothing of who answers them; the cheap model is right where it finds the
prompt likely. So every router over the texts is at a loss, and a reading knows.
"""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from policies.base import ModelFacts, Query
from policies.cascade.base import Reading
from policies.encoders.ngrams import NGrams
from policies.errors import ArtifactError, PolicyError
from policies.evaluation.play import Played, play
from policies.files import write_atomic
from policies.footprint import Rates
from policies.outcomes import Outcome
from policies.plan import Answer, Cascade
from policies.registry import BuildContext
from policies.routing.fit import fit_router
from policies.routing.looks import fit_look
from policies.routing.policy import Learned, Trade
from policies.routing.probing import Probing
from policies.routing.router import Router, load_router, save_router

WORDS = ["apple", "river", "stone", "window", "garden", "candle", "button", "ladder", "basket"]
FACTS = {
    name: ModelFacts(name=name, rates=Rates(usd_per_input_token=usd, usd_per_output_token=usd))
    for name, usd in (("cheap", 1e-7), ("dear", 1e-5))
}
TRADE = Trade(answer_value_usd=2e-3)


def make(number: int, seed: int) -> tuple[list[Outcome], dict[str, dict[str, Reading]]]:
    """Return outcomes whose texts are random words, and the cheap model's readings of them."""
    rng = random.Random(seed)
    rows, told = [], {}
    for n in range(number):
        text = f"Say what {' '.join(rng.choices(WORDS, k=6))} means"
        knows = rng.random() < 0.5
        told[text] = Reading(
            logprob_mean=-1.0 - (not knows) + 0.2 * rng.random(),
            logprob_min=-9.0 * rng.random(),
            entropy=rng.random() if rng.random() < 0.9 else None,
            state_D=np.array([rng.gauss(0, 1) for _ in range(8)], np.float32),
        )
        rows.append(
            Outcome(
                query=text,
                scores={"cheap": float(knows), "dear": 0.9},
                prompt_tokens=20,
                output_tokens={"cheap": 20, "dear": 20},
                tags=(f"task {n % 3}",),
            )
        )
    return rows, {"cheap": told}


ROWS, READINGS = make(240, seed=0)
TESTS, TEST_READINGS = make(120, seed=1)


@pytest.fixture(scope="module")
def router() -> Router:
    """A router that knows readings of the cheap model."""
    return fit_router(ROWS, encoder=NGrams(bits=10), readings=READINGS)


def played(policy: Learned, name: str) -> list[Played]:
    """Return what a policy would have done with the test questions."""
    scorers = {name: policy.scorer} if isinstance(policy, Probing) else {}
    rates = {model: facts.rates for model, facts in FACTS.items()}
    return [
        play(policy, row, rates=rates, scorers=scorers, readings=TEST_READINGS) for row in TESTS
    ]


def test_a_look_gains_where_texts_say_nothing(router: Router) -> None:
    """Better and cheaper than the same router without looks, on questions of no training."""
    blind = played(Learned(router, models=FACTS, trade=TRADE), "probing")
    seeing = played(Probing(router, models=FACTS, trade=TRADE), "probing")
    means = [
        (np.mean([one.quality for one in run]), np.mean([one.usd or 0.0 for one in run]))
        for run in (blind, seeing)
    ]
    (quality, usd), (looked_quality, looked_usd) = means
    # The cheap one where it is right, 0.9 elsewhere: about 0.95 at half the cost.
    assert looked_quality > max(quality, 0.93)
    assert looked_usd < 0.6 * usd or looked_quality > quality + 0.2


def test_a_look_tells_of_tasks_that_the_text_does_not_know() -> None:
    """Though on all tasks that it was learned on the text tells everything that a reading does."""
    rng = random.Random(2)

    def of_task(name: str) -> tuple[list[Outcome], dict[str, Reading]]:
        rows, told = [], {}
        marks = ["".join(rng.choices("bcdfghjklmnpqrstvwxz", k=8)) for _ in range(2)]
        for n in range(60):
            knows = rng.random() < 0.5
            text = f"{name} {n}: {marks[knows]} {' '.join(rng.choices(WORDS, k=3))}"
            told[text] = Reading(logprob_mean=-1.0 - (not knows), logprob_min=-4.0)
            scores = {"cheap": float(knows), "dear": 0.9}
            rows.append(Outcome(query=text, scores=scores, tags=(name,)))
        return rows, told

    learned = [of_task(name) for name in ("sorting", "spelling", "counting", "dividing", "naming")]
    router = fit_router(
        [row for rows, _ in learned for row in rows],
        encoder=NGrams(bits=12),
        readings={"cheap": {text: one for _, told in learned for text, one in told.items()}},
    )
    foresight = Probing(router, models=FACTS).scorer
    rows, told = of_task("unheard")
    stage = Answer(members=("cheap",))
    right, wrong = (
        np.mean(
            [
                foresight.foresee(row.query, stage, told[row.query])
                for row in rows
                if row.scores["cheap"] == score
            ]
        )
        for score in (1.0, 0.0)
    )
    assert right > wrong + 0.3, (right, wrong)


def test_the_plan_says_who_reads_and_what_it_takes(router: Router) -> None:
    """The cheap model first, and a threshold at which it is worth as much as the dear one."""
    policy = Probing(router, models=FACTS, trade=TRADE)
    query = Query(text=TESTS[0].query, prompt_tokens=20, max_tokens=20)
    decision = policy.decide(query)
    assert isinstance(decision.plan, Cascade)
    assert decision.plan.stages == (Answer(members=("cheap",)), Answer(members=("dear",)))
    cheap, dear = (40 * FACTS[name].rates.usd_per_input_token for name in ("cheap", "dear"))
    [threshold] = decision.plan.thresholds
    assert threshold == pytest.approx(decision.scores["dear"] - (dear - cheap) / 2e-3, abs=1e-3)
    assert "cheap reads the prompt" in decision.reason


def test_a_reading_moves_what_is_expected_and_nothing_else_does(router: Router) -> None:
    """Likely prompts raise it, unlikely ones lower it; without a reading it is the text's."""
    foresight = Probing(router, models=FACTS).scorer
    stage, text = Answer(members=("cheap",)), TESTS[0].query
    likely, unlikely = (Reading(logprob_mean=mean, logprob_min=-4.0) for mean in (-0.9, -1.9))
    plain = foresight.foresee(text, stage, None)
    assert foresight.foresee(text, stage, likely) > plain + 0.2
    assert foresight.foresee(text, stage, unlikely) < plain - 0.2
    assert foresight.foresee(text, Answer(members=("dear",)), likely) == foresight.foresee(
        text, Answer(members=("dear",)), None
    )
    assert foresight.foresee(text, Answer(members=("nobody",)), likely) == 0.0


def test_a_choice_that_no_look_can_change_needs_none(router: Router) -> None:
    """Where the dear model is worth hardly anything more, or the cheap one nothing, as before."""
    for value in (1e-6, None):
        policy = Probing(router, models=FACTS, trade=Trade(answer_value_usd=value))
        plain = Learned(router, models=FACTS, trade=Trade(answer_value_usd=value))
        reach = router.looks["cheap"].reach
        for row in TESTS[:20]:
            query = Query(text=row.query, prompt_tokens=20, max_tokens=20)
            scores = plain.decide(query).scores
            price = 0.0 if value is None else 40 * (1e-5 - 1e-7) / value
            settled = abs(scores["dear"] - scores["cheap"] - price) > reach
            assert (policy.decide(query).plan == plain.decide(query).plan) == settled


def test_unfamiliar_queries_get_the_safe_plan_unread(router: Router) -> None:
    """Now, or in an earlier message of the conversation."""
    policy = Probing(router, models=FACTS, trade=TRADE)
    odd = "übermorgen früh um zwölf 北京"
    assert policy.decide(Query(text=odd)).plan == Answer(members=("dear",))
    text = TESTS[0].query
    assert policy.decide(Query(text=text, earlier=(odd,))).plan == Answer(members=("dear",))


def test_a_stored_look_decides_the_same(router: Router, tmp_path: Path) -> None:
    """Through the router's file and a pool's specification; a router without looks is refused."""
    save_router(router, tmp_path / "router.npz")
    context = BuildContext(folder=tmp_path, models=FACTS)
    spec = {"kind": "probing", "path": "router.npz", "answer_value_usd": 2e-3, "scorer": "look"}
    policy = context.build(spec)
    assert isinstance(policy, Probing) and set(context.scorers) == {"look"}
    fresh = Probing(router, models=FACTS, trade=TRADE, scorer="look")
    stored, before = played(policy, "look"), played(fresh, "look")
    assert [one.name for one in stored] == [one.name for one in before]
    save_router(fit_router(ROWS, encoder=NGrams(bits=10)), tmp_path / "router.npz")
    with pytest.raises(PolicyError, match="no model's readings"):
        BuildContext(folder=tmp_path, models=FACTS).build(spec)


def test_what_tells_nothing_is_no_look() -> None:
    """Readings at random (200 of them, ten seeds), too few, or none."""
    told = list(TEST_READINGS["cheap"].values())
    found = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        found += fit_look(told, rng.normal(size=len(told))) is not None
    assert found <= 2
    assert fit_look(told[:20], np.ones(20)) is None
    assert fit_look([None] * 100, np.ones(100)) is None


def squeezed(array: np.ndarray) -> np.ndarray:
    """A look whose scale is none."""
    return np.where(np.arange(3)[:, None] == 1, 0.0, array)


@pytest.mark.parametrize("change", [squeezed, lambda array: array[:2], lambda array: array[:, :2]])
def test_a_damaged_look_is_named(
    router: Router, tmp_path: Path, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    """A scale of nothing, a row or figures missing."""
    file = tmp_path / "router.npz"
    save_router(router, file)
    with np.load(file) as archive:
        arrays = {name: archive[name] for name in archive.files}
    arrays["look.cheap"] = change(arrays["look.cheap"])
    with (tmp_path / "fresh.npz").open("wb") as stream:
        np.savez(stream, **arrays)
    write_atomic(file, (tmp_path / "fresh.npz").read_bytes())
    with pytest.raises(ArtifactError, match="look"):
        load_router(file)
