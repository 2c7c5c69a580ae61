"""The shipped router knows what it does not know: 400 everyday questions of ten kinds."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import mannwhitneyu

from models.pool import DEFAULT_POOL, load_pool
from policies.base import Query
from policies.outcomes import Outcome, read_outcomes, score_table
from policies.plan import members
from policies.registry import build_policy
from policies.routing.fit import reliability
from policies.routing.policy import Learned
from policies.routing.router import Router, load_router

EVERYDAY = [
    json.loads(line)["query"]
    for line in (Path(__file__).parent / "data" / "everyday.jsonl").read_text("utf-8").splitlines()
]


@pytest.fixture(scope="module")
def router() -> Router:
    """The default pool's router."""
    return load_router(DEFAULT_POOL / "router.npz")


@pytest.fixture(scope="module")
def held_out() -> list[Outcome]:
    """The pool's questions that the router has not seen."""
    return read_outcomes(DEFAULT_POOL / "outcomes.jsonl", split="test")


def similarities(router: Router, texts: list[str]) -> NDArray[np.float32]:
    """Return how similar texts are to what the router was trained on."""
    return router.topics.similarities(router.encoder.encode(texts).points_QD)


def test_everyday_questions_are_told_from_the_pools(
    router: Router, held_out: list[Outcome]
) -> None:
    """Similarity separates them at AUROC 0.98, and at most 2% of the pool's are sent away."""
    own = similarities(router, [outcome.query for outcome in held_out])
    other = similarities(router, EVERYDAY)
    auroc = mannwhitneyu(own, other).statistic / (len(own) * len(other))
    assert auroc >= 0.98
    assert np.mean(own < router.doubt.familiar_above) <= 0.02


@pytest.mark.parametrize("fallback", [True, False])
def test_toys_do_not_answer_everyday_questions(fallback: bool) -> None:
    """At most 5% of them get a chunk, with a configured fallback or without one."""
    pool = load_pool(DEFAULT_POOL)
    spec = dict(pool.policies["auto"])
    if not fallback:
        spec.pop("fallback", None)
    policy = build_policy(spec, folder=pool.folder, models=pool.facts())
    assert isinstance(policy, Learned)
    plans = [policy.decide(Query(text=text, max_tokens=64)).plan for text in EVERYDAY]
    assert np.mean([members(plan) not in (("base",), ("general",)) for plan in plans]) <= 0.05


def test_claims_shrink_where_nothing_is_known(router: Router, held_out: list[Outcome]) -> None:
    """Over both kinds together, where no member can do the everyday ones, ECE is at most 0.05."""
    scores_QM = score_table(held_out, router.models).scores_QM
    claims_QM = router.qualities([*(outcome.query for outcome in held_out), *EVERYDAY])
    truth_QM = np.concatenate([scores_QM, np.zeros((len(EVERYDAY), len(router.models)))])
    assert reliability(claims_QM.ravel(), truth_QM.ravel()).ece <= 0.05
    everyday_Q = claims_QM[len(held_out) :].max(1)
    assert np.median(everyday_Q) < 0.2


def test_an_explanation_shows_the_doubt() -> None:
    """It says how unlike the query is, and how much of the prediction is left."""
    pool = load_pool(DEFAULT_POOL)
    policy = build_policy(pool.policies["auto"], folder=pool.folder, models=pool.facts())
    for text, familiar in (("What is 17 * 6?", True), ("Who painted the Mona Lisa?", False)):
        decision = policy.decide(Query(text=text, explain=True))
        assert decision.familiar is familiar
        doubt = decision.details["doubt"]
        assert doubt["familiar"] is familiar
        assert (doubt["similarity"] >= doubt["familiar_above"]) is familiar
        assert (doubt["trust"] == 1.0) is familiar
        assert ("unlike the training queries" in decision.reason) is not familiar
