"""How fast the default router decides and trains: 14,000 training rows, nine members, one core.

The queries are seeded nonsense of a few hundred bytes each, drawn from overlapping vocabularies;
speed does not depend on what they mean. The ceiling is the time to hash the query alone.
Published rates: RouteLLM's matrix factorisation 155 requests/s plus a remote embedding call, its
BERT 70, its causal LLM 42.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from policies.base import ModelFacts, Query
from policies.encoders.ngrams import NGrams
from policies.footprint import Rates
from policies.outcomes import Outcome
from policies.routing.fit import fit_router
from policies.routing.learned import Learned

NUM_MEMBERS = 9
TARGET_US = 200.0
TARGET_PER_S = 5000.0
TARGET_TRAINING_S = 120.0


def run(quick: bool) -> list[dict[str, Any]]:
    """Train once and time single decisions."""
    outcomes = _outcomes(1_500 if quick else 14_000)
    start_s, cpu_s = time.perf_counter(), time.process_time()
    router = fit_router(outcomes, encoder=NGrams())
    training_s, training_cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_s
    rates = Rates(usd_per_input_token=1e-7, usd_per_output_token=2e-7)
    policy = Learned(
        router, models={name: ModelFacts(name=name, rates=rates) for name in router.models}
    )
    queries = [Query(text=outcome.query, prompt_tokens=100) for outcome in outcomes[:2_000]]
    wall_us, cpu_us, hashing_us = [], [], []
    for query in queries:
        start, cpu = time.perf_counter(), time.thread_time()
        policy.decide(query)
        wall_us.append((time.perf_counter() - start) * 1e6)
        cpu_us.append((time.thread_time() - cpu) * 1e6)
        start = time.perf_counter()
        router.encoder.features(query.text)
        hashing_us.append((time.perf_counter() - start) * 1e6)
    size = float(np.mean([len(query.text) for query in queries]))
    p50_us, rate = float(np.median(wall_us)), 1e6 / float(np.mean(cpu_us))
    about = {
        "training_rows": len(outcomes),
        "members": NUM_MEMBERS,
        "mean_query_bytes": round(size),
    }
    return [
        {
            "name": "routing decision, p50, default encoder",
            "unit": "µs",
            "ceiling": round(float(np.median(hashing_us)), 1),
            "target": TARGET_US,
            "measured": round(p50_us, 1),
            "ok": p50_us <= TARGET_US,
            **about,
        },
        {
            "name": "routing decisions on one core, per second of CPU time",
            "unit": "1/s",
            "target": TARGET_PER_S,
            "measured": round(rate),
            "ok": rate >= TARGET_PER_S,
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
    ]


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
