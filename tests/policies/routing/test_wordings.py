"""What people write around a question is no sign of who should answer it."""

import numpy as np

from models.pool import DEFAULT_POOL, load_pool
from policies.base import Query
from policies.outcomes import read_outcomes
from policies.plan import Answer, members
from policies.registry import build_policy
from policies.routing.phrases import wrapped
from policies.routing.router import load_router
from tests.bench.doubt import WORDINGS

MOST_CHANGED = 0.05


def test_other_words_around_a_question_change_few_decisions() -> None:
    """Of 200 of the pool's held-out questions, each in one of many wordings, at most 5% get another
    decision than bare. Nobody trained on these wordings.
    """
    pool = load_pool(DEFAULT_POOL)
    policy = build_policy(pool.policies["auto"], folder=pool.folder, models=pool.facts())
    bare = [row.query for row in read_outcomes(DEFAULT_POOL / "outcomes.jsonl", split="test")][::16]
    assert len(bare) == 200

    def chosen(text: str) -> tuple[str, ...]:
        return members(policy.decide(Query(text=text, max_tokens=64)).plan)

    worded = [WORDINGS[n % len(WORDINGS)].format(text) for n, text in enumerate(bare)]
    pairs = zip(bare, worded, strict=True)
    changed = [text for text, other in pairs if chosen(text) != chosen(other)]
    assert len(changed) <= MOST_CHANGED * len(bare), changed


def test_a_question_among_small_talk_is_found() -> None:
    """The part that is like the field decides, wherever it stands; small talk alone does not."""
    pool = load_pool(DEFAULT_POOL)
    policy = build_policy(pool.policies["auto"], folder=pool.folder, models=pool.facts())
    talk, task, other = "We argued about this at lunch.", "What is 37 + 58?", "Who wrote Hamlet?"
    for text in (f"{talk} {task}", f"{task} {talk}", f"{talk}\n{task}\n{talk}", f"37 + 58 {talk}"):
        assert policy.decide(Query(text=text)).plan == Answer(members=("arithmetic",))
    for text in (talk, f"{talk} {other}", f"{other} {talk}", f"{task} {other}", f"{other} {task}"):
        assert policy.decide(Query(text=text)).plan == Answer(members=("general",))


def test_an_acronym_begins_no_sentence() -> None:
    """What follows it belongs to the question: half of it may be like the field, all of it not."""
    pool = load_pool(DEFAULT_POOL)
    policy = build_policy(pool.policies["auto"], folder=pool.folder, models=pool.facts())
    for text in ("Convert 100 USD to EUR", "Convert 25 GBP to CHF", "Convert 3 BTC to USD please"):
        assert policy.decide(Query(text=text)).plan == Answer(members=("general",))
    assert policy.decide(Query(text="Convert 5 km to m")).plan == Answer(members=("conversion",))


def test_a_request_beside_a_question_decides() -> None:
    """Whoever answers must know it too: of 200 of the pool's questions beside an everyday request
    that no router learned from, before it or after it, most go to who answers the latter.
    """
    pool = load_pool(DEFAULT_POOL)
    policy = build_policy(pool.policies["auto"], folder=pool.folder, models=pool.facts())
    own = read_outcomes(DEFAULT_POOL / "outcomes.jsonl", split="test")[::16]
    others = [
        row.query
        for row in read_outcomes(DEFAULT_POOL / "everyday.jsonl", split="test")
        if row.query[-1] in "?." and len(row.query) < 120
    ]
    found = 0
    for n, row in enumerate(own):
        question = row.query if row.query[-1] in "?." else f"{row.query}."
        other = others[n % len(others)]
        text = f"{question} {other}" if n % 2 else f"{other} {question}"
        found += members(policy.decide(Query(text=text, max_tokens=64)).plan) == ("general",)
    assert found >= 0.6 * len(own)


def test_many_queries_are_read_as_one_is() -> None:
    """By what they ask, without what is said around it; evaluation sees what serving does."""
    router = load_router(DEFAULT_POOL / "router.npz")
    texts = ["Hi there! What is 37 + 58? Thanks!", "What is 37 + 58?", "Who wrote Hamlet? Thanks!"]
    assert [router.asked(text) for text in texts] == ["What is 37 + 58?", *texts[1:]]
    quality_QM = router.qualities(texts)
    alone_QM = [router.predict(text).quality_M for text in texts]
    np.testing.assert_allclose(quality_QM, alone_QM, atol=1e-5)
    np.testing.assert_array_equal(quality_QM[0], quality_QM[1])


def test_a_text_stays_whole_between_its_phrases() -> None:
    """Every copy holds its text, nearly all of them something more, the same for the same seed."""
    texts = [f"what is {number} + 1?" for number in range(200)]
    copies = wrapped(texts, seed=3)
    assert all(text in copy for text, copy in zip(texts, copies, strict=True))
    assert all(text != copy for text, copy in zip(texts, copies, strict=True))
    assert copies == wrapped(texts, seed=3) != wrapped(texts, seed=4)
