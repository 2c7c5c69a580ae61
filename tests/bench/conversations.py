"""How often a conversation changes hands, by the margin for which it does.

Ten-turn conversations of the shipped pool's own test questions: a turn keeps to the topic of the
one before with probability `KEEPS`. The pool's `auto` decides each turn, `router.conversations`
whether the conversation stays. Every question's answers were graded when the pool was made, so
that what staying costs is known; what it spares is the share of a turn's earlier text that who
answers has read already, which a prefix cache can keep. Prints one line of JSON per margin.

    python -m tests.bench.conversations

With `--served N` it holds N conversations with the pool itself, over HTTP, without the margin (0,
at which only equals stay) and with it. There half the topics are everyday requests, for the general
model; what was found in caches is what the answers' usage says.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar

import httpx

from models.pool import DEFAULT_POOL, load_pool
from models.tasks.base import Split
from policies.base import Policy, Query
from policies.outcomes import Outcome, read_outcomes
from policies.plan import Answer
from router.catalog.catalog import load_catalog
from router.catalog.policies import STAY_MARGIN
from router.conversations import stay
from tests.bench.everyday import everyday
from tests.bench.with_general import Question, exact, serving

T = TypeVar("T")

TURNS, CONVERSATIONS, KEEPS = 10, 300, 0.7
MARGINS = (0.0, 0.05, 0.1, 0.2, 0.4)


def draw(by_topic: Mapping[str, Sequence[T]], rng: random.Random) -> list[T]:
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


def converse(client: httpx.Client, turns: Sequence[Question]) -> dict[str, list[Any]]:
    """Hold a conversation; return who answered, the scores, and the tokens of each later turn."""
    messages: list[dict[str, str]] = []
    told: dict[str, list[Any]] = {key: [] for key in ("members", "scores", "prompt", "cached")}
    for turn in turns:
        messages.append({"role": "user", "content": turn.text})
        body = {"model": "auto", "messages": messages, "temperature": 0, "max_tokens": 32}
        answer = client.post("/v1/chat/completions", json=body).raise_for_status().json()
        text = answer["choices"][0]["message"]["content"]
        told["members"].append(answer["shoal"]["members"])
        told["scores"].append(turn.grade(text))
        if len(messages) > 1:
            told["prompt"].append(answer["usage"]["prompt_tokens"])
            told["cached"].append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        messages.append({"role": "assistant", "content": text})
    return told


def serve(number: int) -> None:
    """Print the figures of `number` conversations with the pool, without its margin and with it."""
    by_topic: defaultdict[str, list[Question]] = defaultdict(list)
    for row in read_outcomes(DEFAULT_POOL / "outcomes.jsonl", split="test"):
        grade = partial(exact, row.answer or "")
        by_topic[row.tags[0]].append(Question(text=row.query, grade=grade))
    for request in everyday():
        if request.split is Split.TEST:
            question = Question(text=request.text, grade=request.grade)
            by_topic[f"everyday {request.kind}"].append(question)
    rng = random.Random(0)
    conversations = [draw(by_topic, rng) for _ in range(number)]
    for margin in (0.0, STAY_MARGIN):
        with serving(stay_margin=margin) as client:
            told = [converse(client, turns) for turns in conversations]
        prompt, cached = (sum(sum(one[key]) for one in told) for key in ("prompt", "cached"))
        scores = [score for one in told for score in one["scores"]]
        members = Counter(name for one in told for [name] in one["members"])
        row: dict[str, Any] = {
            "margin": margin,
            "conversations": number,
            "switches": round(sum(_changes(one["members"]) for one in told) / number, 2),
            "right": round(sum(scores) / len(scores), 4),
            "prompt_tokens": prompt,
            "cached_tokens": cached,
            "cached": round(cached / prompt, 4),
            "answers": dict(members.most_common()),
        }
        print(json.dumps(row), flush=True)


def _changes(members: Sequence[Any]) -> int:
    return sum(one != other for one, other in pairwise(members))


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--served", type=int, metavar="N", help="hold N conversations over HTTP")
    number = parser.parse_args().served
    if number is not None:
        serve(number)
        return
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
