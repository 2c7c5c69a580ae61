"""What people say around a question is no sign of who should answer it."""

from models.pool import DEFAULT_POOL, load_pool
from policies.base import Query
from policies.outcomes import read_outcomes
from policies.plan import members
from policies.registry import build_policy
from policies.routing.phrases import wrapped

MOST_SENT_AWAY = 0.05


def test_the_shipped_router_knows_phrases() -> None:
    """Of 200 of the pool's held-out questions with phrases around them at most 5% go to another
    than the toys, where bare none does; phrases that it did not learn from are in docs/routing.
    """
    pool = load_pool(DEFAULT_POOL)
    policy = build_policy(pool.policies["auto"], folder=pool.folder, models=pool.facts())
    bare = [row.query for row in read_outcomes(DEFAULT_POOL / "outcomes.jsonl", split="test")][::16]

    def sent_away(texts: list[str]) -> float:
        plans = [policy.decide(Query(text=text, max_tokens=64)).plan for text in texts]
        return sum("general" in members(plan) for plan in plans) / len(texts)

    assert len(bare) == 200
    assert sent_away(bare) <= 0.01
    assert sent_away(wrapped(bare, seed=1)) <= MOST_SENT_AWAY


def test_a_text_stays_whole_between_its_phrases() -> None:
    """Every copy holds its text, nearly all of them something more, the same for the same seed."""
    texts = [f"what is {number} + 1?" for number in range(200)]
    copies = wrapped(texts, seed=3)
    assert all(text in copy for text, copy in zip(texts, copies, strict=True))
    assert all(text != copy for text, copy in zip(texts, copies, strict=True))
    assert copies == wrapped(texts, seed=3) != wrapped(texts, seed=4)
