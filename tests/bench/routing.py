"""How fast the default router decides (one core) and trains (two): 14,000 rows, nine members.

The queries are seeded nonsense of a few hundred bytes each, drawn from overlapping vocabularies;
speed does not depend on what they mean. The ceiling is the time to hash the query alone, which also
tells how fast the machine's clock was.
Published rates: RouteLLM's matrix factorisation 155 requests/s plus a remote embedding call, its
BERT 70, its causal LLM 42.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from policies.base import ModelFacts, Query
from policies.encoders.ngrams import NGrams
from policies.encoders.transformer import SentenceVectors
from policies.footprint import Rates
from policies.outcomes import Outcome
from policies.plan import Answer
from policies.routing.fit import fit_router
from policies.routing.policy import Learned

NUM_MEMBERS = 9
TARGET_US = 200.0
TARGET_PER_S = 5000.0
TARGET_TRAINING_S = 120.0
TARGET_ENCODING_MS = 10.0
ROUNDS = 5


def run(quick: bool) -> list[dict[str, Any]]:
    """Train once and time single decisions."""
    outcomes = _outcomes(1_500 if quick else 14_000)
    start_s, cpu_s = time.perf_counter(), time.process_time()
    router = fit_router(outcomes, encoder=NGrams())
    training_s, training_cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_s
    rates = Rates(usd_per_input_token=1e-7, usd_per_output_token=2e-7)
    facts = {name: ModelFacts(name=name, rates=rates) for name in router.models}
    safe = Answer(members=(router.models[0],))
    queries = [Query(text=outcome.query, prompt_tokens=100) for outcome in outcomes[:2_000]]
    calls: dict[str, Callable[[Query], object]] = {
        "plain": Learned(router, models=facts).decide,
        "safe": Learned(router, models=facts, unfamiliar=safe).decide,
        "hashing": lambda query: router.encoder.features(query.text),
    }
    times = {name: _Times() for name in calls}
    # By turns, as clocks change; each over all queries, so that none finds its rows in the cache.
    with threadpool_limits(1):
        for _ in range(ROUNDS):
            for name, call in calls.items():
                times[name].measure(call, queries)
    plain, safe_p50_us = times["plain"], times["safe"].p50_us
    hashing_us = round(times["hashing"].p50_us, 1)
    size = float(np.mean([len(query.text) for query in queries]))
    about = {
        "training_rows": len(outcomes),
        "members": NUM_MEMBERS,
        "mean_query_bytes": round(size),
    }
    return [
        {
            "name": "routing decision, p50, default encoder",
            "unit": "µs",
            "ceiling": hashing_us,
            "target": TARGET_US,
            "measured": round(plain.p50_us, 1),
            "ok": plain.p50_us <= TARGET_US,
            **about,
        },
        {
            "name": "the same with a safe plan, for which doubt is measured",
            "unit": "µs",
            "ceiling": hashing_us,
            "target": TARGET_US,
            "measured": round(safe_p50_us, 1),
            "ok": safe_p50_us <= TARGET_US,
            **about,
        },
        {
            "name": "routing decisions on one core, per second of CPU time",
            "unit": "1/s",
            "target": TARGET_PER_S,
            "measured": round(plain.per_cpu_s),
            "ok": plain.per_cpu_s >= TARGET_PER_S,
            **about,
        },
        {
            "name": "training a router",
            "unit": "s",
            "target": TARGET_TRAINING_S,
            "measured": round(training_s, 1),
            "cpu_s": round(training_cpu_s, 1),
            "ok": training_s <= TARGET_TRAINING_S,
            **about,
        },
        _encoding(20 if quick else 200),
    ]


def _encoding(num_queries: int) -> dict[str, Any]:
    """Time a sentence encoder of MiniLM's shape on questions of some fifteen tokens, one core.

    Its weights are drawn by lot (seed 0): they make no difference to the time.
    """
    with TemporaryDirectory() as folder:
        vectors = SentenceVectors(_shaped_like_minilm(Path(folder)), max_tokens=256)
        questions = [f"How many of the {n} apples are left after {n + 3} days, and why?" for n in
                     range(num_queries)]  # fmt: skip
        vectors(questions[:3])
        one, many = _Times(), _Times()
        with threadpool_limits(1):
            for question in questions:
                one.measure(lambda query: vectors([query.text]), [Query(text=question)])
            many.measure(lambda _: vectors(questions), [Query(text="")])
    return {
        "name": "a sentence encoder of six layers, one query, p50",
        "unit": "ms",
        "target": TARGET_ENCODING_MS,
        "measured": round(one.p50_us / 1e3, 2),
        "batched": round(many.p50_us / 1e3 / num_queries, 2),
        "ok": one.p50_us / 1e3 <= TARGET_ENCODING_MS,
    }


def _shaped_like_minilm(folder: Path) -> Path:
    import torch
    from transformers import BertConfig, BertModel
    from transformers.models.bert import BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = BertConfig(
        vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536,
    )  # fmt: skip
    BertModel(shape).save_pretrained(folder)
    return folder


class _Times:
    """How long single calls took."""

    def __init__(self) -> None:
        self.wall_s: list[float] = []
        self.cpu_s = 0.0

    def measure(self, call: Callable[[Query], object], queries: Sequence[Query]) -> None:
        """Add one call per query; the CPU time is that of all of them, measuring included."""
        cpu_s = time.thread_time()
        for query in queries:
            start_s = time.perf_counter()
            call(query)
            self.wall_s.append(time.perf_counter() - start_s)
        self.cpu_s += time.thread_time() - cpu_s

    @property
    def p50_us(self) -> float:
        """The median time of one call."""
        return float(np.median(self.wall_s)) * 1e6

    @property
    def per_cpu_s(self) -> float:
        """Calls per second of CPU time."""
        return len(self.wall_s) / self.cpu_s


def _outcomes(num_queries: int) -> list[Outcome]:
    """Return queries of ten topics, each with a vocabulary that only half overlaps (seed 0)."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = ["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(20_000)]
    skill_TM = rng.uniform(0.2, 0.9, (10, NUM_MEMBERS))
    outcomes = []
    for _ in range(num_queries):
        topic = int(rng.integers(10))
        picks = (rng.pareto(1.0, 60) * 40).astype(int) % 11_000 + topic * 1_000
        outcomes.append(
            Outcome(
                query=" ".join(words[i] for i in picks % len(words)),
                scores={
                    f"model-{m}": float(rng.random() < skill_TM[topic, m])
                    for m in range(NUM_MEMBERS)
                },
                tags=(f"topic {topic}",),
            )
        )
    return outcomes
