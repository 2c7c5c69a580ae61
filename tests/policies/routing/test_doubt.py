"""The shipped router knows what it does not know: 400 everyday questions of ten kinds.

None of them is trained on. `usable` says of some whether the answer of the pool's `general` was.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from models.pool import DEFAULT_POOL, load_pool
from policies.base import ModelFacts, Query
from policies.outcomes import Outcome, read_outcomes, score_table
from policies.plan import members
from policies.registry import build_policy
from policies.routing.fit import reliability
from policies.routing.router import Router, load_router

ROWS = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "everyday.jsonl").read_text("utf-8").splitlines()
]
EVERYDAY = [row["query"] for row in ROWS]
# Written before the router was trained, and looked at once afterwards: numbers, the pool's own
# words, next to nothing, other languages.
NEW = (
    "How many planets are there?", "How many keys does a piano have?",
    "What is the largest lake in Italy?", "What date is Bastille Day?",
    "What year was Mozart born?",
    "Which month is named after Julius Caesar?", "who", "zzz", "?!", "tell me more",
    "Wie hoch ist der Eiffelturm?", "Combien coûte un pain ?", "Quante corde ha una chitarra?",
    "太陽系には惑星がいくつありますか。",
    "Write a poem about the number seven.", "What does XXL mean?",
    "Which word has no vowels?", "How many calories are in a banana?", "What comes before the egg?",
    "Give me three synonyms of happy.",
)  # fmt: skip
GENERAL = "general"


@pytest.fixture(scope="module")
def router() -> Router:
    """The default pool's router."""
    return load_router(DEFAULT_POOL / "router.npz")


@pytest.fixture(scope="module")
def held_out() -> list[Outcome]:
    """The pool's questions that the router has not seen."""
    return read_outcomes(DEFAULT_POOL / "outcomes.jsonl", split="test")


def test_everyday_questions_are_told_from_the_pools(
    router: Router, held_out: list[Outcome]
) -> None:
    """Similarity separates them at AUROC 0.98, and at most 2% of the pool's are sent away."""
    own = router.similarities([outcome.query for outcome in held_out])
    other = router.similarities(EVERYDAY)
    auroc = mannwhitneyu(own, other).statistic / (len(own) * len(other))
    assert auroc >= 0.98
    assert np.mean(own < router.doubt.familiar_above) <= 0.02


def test_none_of_them_is_trained_on() -> None:
    """The everyday requests that the router learns from are others."""
    learned = read_outcomes(DEFAULT_POOL / "everyday.jsonl")
    assert not {row.query.lower() for row in learned} & {text.lower() for text in EVERYDAY}


@pytest.mark.parametrize("fallback", [True, False])
def test_toys_answer_their_own_questions_alone(fallback: bool, held_out: list[Outcome]) -> None:
    """They get at most 5% of the everyday ones, `general` at most 2% of theirs; with a configured
    a safe plan or without one."""
    pool = load_pool(DEFAULT_POOL)
    spec = dict(pool.policies["auto"])
    if not fallback:
        spec.pop("unfamiliar", None)
    models = {**pool.facts(), GENERAL: ModelFacts(name=GENERAL, rates=pool.facts()["base"].rates)}
    policy = build_policy(spec, folder=pool.folder, models=models)

    def share_of_general(texts: list[str]) -> float:
        plans = [policy.decide(Query(text=text, max_tokens=64)).plan for text in texts]
        return float(np.mean([members(plan) == (GENERAL,) for plan in plans]))

    assert share_of_general(EVERYDAY) >= 0.95
    assert share_of_general([outcome.query for outcome in held_out]) <= 0.02
    assert share_of_general(list(NEW)) == 1


def test_a_conversation_is_as_strange_as_its_strangest_message() -> None:
    """Whoever answers must understand all of it: a sum after small talk is `general`'s."""
    pool = load_pool(DEFAULT_POOL)
    models = {**pool.facts(), GENERAL: ModelFacts(name=GENERAL, rates=pool.facts()["base"].rates)}
    policy = build_policy(pool.policies["auto"], folder=pool.folder, models=models)
    talk, task = "Tell me about the history of Lisbon.", "What is 37 + 58?"
    for earlier, expected in (((task,), "arithmetic"), ((talk, task), GENERAL)):
        decision = policy.decide(Query(text="What is 14 + 71?", earlier=earlier))
        assert members(decision.plan) == (expected,)
    assert "earlier message" in decision.reason


def test_claims_are_what_comes_true(router: Router, held_out: list[Outcome]) -> None:
    """Over both kinds together, where no toy can do the everyday ones, ECE is at most 0.05."""
    general = router.models.index(GENERAL)
    scores_QM = score_table(held_out, router.models).scores_QM
    claims_QM = router.qualities([*(outcome.query for outcome in held_out), *EVERYDAY])
    everyday_QM = np.zeros((len(EVERYDAY), len(router.models)))
    everyday_QM[:, general] = [row.get("usable", np.nan) for row in ROWS]
    truth_QM = np.concatenate([scores_QM, everyday_QM])
    assert reliability(claims_QM.ravel(), truth_QM.ravel()).ece <= 0.05
    toys_QM = np.delete(claims_QM[len(held_out) :], general, axis=1)
    assert np.median(toys_QM.max(1)) < 0.1


def test_an_explanation_shows_the_doubt() -> None:
    """It says how unlike the query is, and what is expected all the same."""
    pool = load_pool(DEFAULT_POOL)
    policy = build_policy(pool.policies["auto"], folder=pool.folder, models=pool.facts())
    for text, familiar in (("What is 17 * 6?", True), ("Who painted the Mona Lisa?", False)):
        decision = policy.decide(Query(text=text, explain=True))
        assert decision.familiar is familiar
        doubt = decision.details["doubt"]
        assert doubt["familiar"] is familiar
        assert (doubt["similarity"] >= doubt["familiar_above"]) is familiar
        assert ("unlike the training queries" in decision.reason) is not familiar
