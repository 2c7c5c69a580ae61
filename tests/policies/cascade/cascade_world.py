"""A made-up pool whose answers behave like real ones: domains, confidence, a strong base."""

import numpy as np

from policies.cascade.answers import AnswerTable
from policies.plan import Answer

DOMAINS = ("sum", "date", "list")
PRICES = np.array([1.0, 1.0, 1.0, 6.0])


def answer_table(seed: int, num_queries: int) -> AnswerTable:
    """Draw answers of three specialists and a base.

    A specialist is right on 85% of its own domain and 10% elsewhere, the base on 90%; right
    answers come with higher log-probabilities, with overlap.
    """
    rng = np.random.default_rng(seed)
    domain = rng.integers(0, 3, num_queries)
    chance = np.full((num_queries, 4), 0.1)
    chance[np.arange(num_queries), domain] = 0.85
    chance[:, 3] = 0.9
    right = rng.random(chance.shape) < chance
    mean = -np.exp(rng.normal(np.where(right, -3.0, -0.5), 1.0))
    plans = {name: Answer(members=(name,)) for name in (*DOMAINS, "base")}
    return AnswerTable(
        plans=plans,
        queries=tuple(
            f"{DOMAINS[d]} of {rng.integers(1000)} and {i}" for i, d in enumerate(domain)
        ),
        answers=tuple(
            tuple(
                "right" if right[q, s] else f"wrong {rng.integers(5)}" for q in range(num_queries)
            )
            for s in range(4)
        ),
        logprob_mean_QS=mean,
        logprob_min_QS=mean * rng.uniform(1, 4, mean.shape),
        num_tokens_QS=rng.integers(1, 9, mean.shape).astype(float),
        quality_QS=right.astype(float),
    )


def costs(table: AnswerTable) -> np.ndarray:
    """Return US dollars per query and stage: a price per token read, the same for all queries."""
    return np.tile(PRICES, (len(table.queries), 1))
