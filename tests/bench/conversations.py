"""How often a conversation changes hands, by the margin for which it does.

Ten-turn conversations of the shipped pool's own test questions: a turn keeps to the topic of the
one before with probability `KEEPS`. The pool's `auto` decides each turn, `router.conversations`
whether the conversation stays. Every question's answers were graded when the pool was made, so
that what staying costs is known; what it spares is the share of a turn's earlier text that who
answers has read already, which a prefix cache can keep. Prints one line of JSON per margin.

    python -m tests.bench.conversations
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from typing import Any

from models.pool import DEFAULT_POOL, load_pool
from policies.base import Policy, Query
from policies.outcomes import Outcome, read_outcomes
from policies.plan import Answer
from router.catalog.catalog import load_catalog
from router.conversations import stay

TURNS, CONVERSATIONS, KEEPS = 10, 300, 0.7
MARGINS = (0.0, 0.05, 0.1, 0.2, 0.4)


def draw(by_topic: dict[str, list[Outcome]], rng: random.Random) -> list[Outcome]:
    """Return one conversation's questions."""
    topics = sorted(by_topic)
    topic, turns = rng.choice(topics), []
    for _ in range(TURNS):
        if rng.random() > KEEPS:
            topic = rng.choice(topics)
        turns.append(rng.choice(by_topic[topic]))
    return turns


def play(policy: Policy, turns: list[Outcome], margin: float | None) -> tuple[int, float, int, int]:
    """Return the changes, the mean score, and the earlier text: read before, and in all."""
    last: Answer | None = None
    asked: list[str] = []
    read: defaultdict[str, int] = defaultdict(int)
    switches, right, spared, total, history = 0, 0.0, 0, 0, 0
    for turn in turns:
        decision = policy.decide(Query(text=turn.query, earlier=tuple(asked[-8:])))
        if margin is not None and last is not None:
            decision = stay(decision, last, margin=margin, in_call=False)
        assert isinstance(decision.plan, Answer)
        [name] = decision.plan.members
        switches += last is not None and decision.plan != last
        right += turn.scores.get(name, 0.0)
        spared += read[name]
        total += history
        history += len(turn.query)
        read[name] = history
        last = decision.plan
        asked.append(turn.query)
    return switches, right / len(turns), spared, total


def main() -> None:
    """Print the figures of each margin."""
    policy = load_catalog(load_pool(DEFAULT_POOL)).policies["auto"]
    by_topic: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in read_outcomes(DEFAULT_POOL / "outcomes.jsonl", split="test"):
        by_topic[outcome.tags[0]].append(outcome)
    rng = random.Random(0)
    conversations = [draw(by_topic, rng) for _ in range(CONVERSATIONS)]
    for margin in (None, *MARGINS):
        told = [play(policy, turns, margin) for turns in conversations]
        row: dict[str, Any] = {
            "margin": margin,
            "switches": round(sum(one[0] for one in told) / len(told), 2),
            "score": round(sum(one[1] for one in told) / len(told), 4),
            "read_before": round(sum(one[2] for one in told) / sum(one[3] for one in told), 4),
        }
        print(json.dumps(row))


if __name__ == "__main__":
    main()
