"""What the default pool's router knows that it does not know, with 95% intervals.

`python -m tests.bench.doubt` prints two tables of docs/routing/results.md; with `--encoder
neural:FOLDER` those of a router over a sentence encoder that learned the same. *Doubt*: the pool's
held-out questions beside everyday ones that no router learned from: how similarity tells them
apart, how many go where they should not, and how far claims are from what answers scored, over both
together. *Wordings*: how often the same question with something said around it gets another
decision, in words that no training knows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from models.pool import DEFAULT_POOL, load_pool
from policies.base import Query
from policies.encoders.base import Encoder, parse_encoder
from policies.evaluation.metrics import bootstrap
from policies.outcomes import Outcome, read_outcomes
from policies.plan import members
from policies.registry import build_policy
from policies.routing.fit import fit_router, reliability
from policies.routing.policy import Learned
from policies.routing.router import save_router
from policies.tables import text_table

GENERAL = "general"
TEN_KINDS = Path(__file__).parents[1] / "policies" / "routing" / "data" / "everyday.jsonl"
EVERY = 16

WORDINGS = (
    "Howdy! {}", "Greetings, friend. {}", "Sir, {}", "Knock knock. {}", "Listen: {}",
    "Pop quiz: {}", "Here is one for you: {}", "My grandmother would like to know: {}",
    "The exercise reads: {}", "From page 12 of the book: {}",
    "Could I bother you with this one? {}", "I lost a bet over this: {}", "Exercise 4. {}",
    "Dear computer, {}", "Before lunch, please: {}", "Let me ask you something, {}",
    "I am preparing for a test. {}", "As a teacher, I ask my class: {}",
    "Do you happen to know {}", "Please help me figure out {}", "I wonder {}",
    "User: {}\nAssistant:", "### Question\n{}\n### Answer\n", "Answer correctly: {}", "Solve: {}",
    "{} Ta!", "{} Bless you.", "{} My brother says I am wrong.",
    "{} I have been at it all morning.", "{} It is for a crossword.", "{} Give only the answer.",
    "{} No explanation needed.", "{} Answer in a single word or number.", "{} Sincerely, Maria",
    "{} It came up in a meeting.", "{} Sent from my phone",
    "{} I am in a hurry, the bus leaves soon.", "{} :)", "{} pls", "{} Right?",
    "So I was doing the dishes when my son asked me this. {}",
    "We are building a small website and need this: {} Thanks in advance, the team",
)  # fmt: skip
"""In no training; nothing was chosen by them."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", help="Learn a router over it, in place of the pool's own.")
    parser.add_argument("--every", type=int, default=1, help="Take one in so many own questions.")
    given = parser.parse_args(arguments)
    pool = load_pool(DEFAULT_POOL)
    with TemporaryDirectory() as folder:
        spec = dict(pool.policies["auto"])
        if given.encoder:
            spec["path"] = str(learned(parse_encoder(given.encoder, {"bits": 15}), Path(folder)))
        policy = build_policy(spec, folder=pool.folder, models=pool.facts())
    assert isinstance(policy, Learned)
    own = read_outcomes(DEFAULT_POOL / "outcomes.jsonl", split="test")[:: given.every]
    print(text_table(doubt(policy, own), num_left=1))
    print()
    print(text_table(wordings(policy, own[::EVERY])))


def learned(encoder: Encoder, folder: Path) -> Path:
    """Return the file of a router that learned over `encoder` what the pool's has."""
    home, outside = (
        read_outcomes(DEFAULT_POOL / name, split="router")
        for name in ("outcomes.jsonl", "everyday.jsonl")
    )
    file = folder / "router.npz"
    save_router(fit_router(home, encoder=encoder, outside=outside), file)
    return file


def chosen(policy: Learned, text: str) -> str:
    """Return who answers a question."""
    [name] = members(policy.decide(Query(text=text, max_tokens=64)).plan)
    return name


def doubt(policy: Learned, own: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Return a row for each figure, over two kinds of everyday questions."""
    subjects = read_outcomes(DEFAULT_POOL / "everyday.jsonl", split="test")
    kinds = [json.loads(line)["query"] for line in TEN_KINDS.read_text().splitlines()]
    own_texts = [row.query for row in own]
    near_O = policy.router.similarities(own_texts)
    sent_away = [chosen(policy, text) == GENERAL for text in own_texts]
    rows: list[tuple[str, ...]] = [("figure", "value", "95% interval")]
    for name, texts in (
        ("subjects of everyday.jsonl", [row.query for row in subjects]),
        ("ten kinds", kinds),
    ):
        near_E = policy.router.similarities(texts)
        rows.append((f"AUROC of similarity, {len(texts)} of {name}", *area(near_O, near_E)))
        toys = [chosen(policy, text) != GENERAL for text in texts]
        rows.append((f"of these a toy answers {sum(toys)}", *share(toys)))
    rows.append((f"of {len(own)} held-out questions `general` gets", *share(sent_away)))
    claims, scores = claimed(policy, [*own, *subjects])
    rows.append((f"ECE over {len(claims)} of both", *within(claims, scores)))
    return rows


def area(near_O: NDArray[np.float32], near_E: NDArray[np.float32]) -> tuple[str, str]:
    """Return how well similarity tells own questions from everyday ones."""
    is_own = np.repeat([True, False], [len(near_O), len(near_E)])
    near = np.concatenate([near_O, near_E])
    return interval(lambda rows: float(roc_auc_score(is_own[rows], near[rows])), len(near))


def within(claims: NDArray[np.float64], scores: NDArray[np.float64]) -> tuple[str, str]:
    """Return the expected calibration error; resampling alone makes it larger."""
    return interval(lambda rows: reliability(claims[rows], scores[rows]).ece, len(claims))


def interval(metric: Callable[[NDArray[np.intp]], float], number: int) -> tuple[str, str]:
    """Return a metric of all rows, and its bootstrap interval."""
    low, high = bootstrap(metric, number)
    return f"{metric(np.arange(number)):.4f}", f"[{low:.4f}, {high:.4f}]"


def share(found: Sequence[bool]) -> tuple[str, str]:
    """Return a share and its Wilson interval."""
    bounds = binomtest(sum(found), len(found)).proportion_ci(method="wilson")
    return f"{np.mean(found):.2%}", f"[{bounds.low:.2%}, {bounds.high:.2%}]"


def claimed(
    policy: Learned, rows: Sequence[Outcome]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what is expected of who answers, and what that model scored, where it is known."""
    pairs = []
    for row in rows:
        decision = policy.decide(Query(text=row.query, max_tokens=64))
        [name] = members(decision.plan)
        if name in row.scores:
            pairs.append((decision.scores[name], row.scores[name]))
    claims, scores = np.array(pairs, np.float64).T
    return claims, scores


def wordings(policy: Learned, rows: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """Return a row for each wording, and one for all."""
    bare = [chosen(policy, row.query) for row in rows]
    table: list[tuple[str, ...]] = [("wording", "another decision", "95% interval", "`general`")]
    every: list[tuple[bool, bool]] = []
    for wording in WORDINGS:
        now = [chosen(policy, wording.format(row.query)) for row in rows]
        found = [(a != b, a == GENERAL) for a, b in zip(now, bare, strict=True)]
        every += found
        table.append((repr(wording.format("…")), *_shares(found)))
    return [*table, (f"all {len(WORDINGS)}", *_shares(every))]


def _shares(found: Sequence[tuple[bool, bool]]) -> tuple[str, str, str]:
    changed, away = zip(*found, strict=True)
    return (*share(changed), f"{np.mean(away):.1%}")


if __name__ == "__main__":
    main()
