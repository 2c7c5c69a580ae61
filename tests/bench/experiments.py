"""What an experiment costs a request, and how long a report takes.

The ceiling of an assignment is a single keyed hash of the unit's name; the target is 20 µs with
five arms and a holdout. A report reads 100,000 requests of 20,000 users with CUPED, three metrics
and one guardrail.
"""

from __future__ import annotations

import time
from hashlib import blake2b
from typing import Any

import numpy as np

from policies.experiments.analysis import analyse, arm_names
from policies.experiments.assignment import Assigner, Visit
from policies.experiments.effects import Observations
from policies.experiments.experiment import Arm, Experiment
from policies.experiments.metrics import Guardrail

TARGET_US = 20.0


def run(quick: bool) -> list[dict[str, Any]]:
    """Time assignments one by one, and one report."""
    arms = tuple(Arm(name=f"arm{i}", policy=f"policy{i}", weight=0.2) for i in range(5))
    experiment = Experiment(name="bench", arms=arms, traffic=0.9, holdout=0.05)
    assigner = Assigner([experiment])
    assign_us, hash_us = [], []
    for i in range(2_000 if quick else 20_000):
        visit = Visit(request_id=f"r{i}", model="auto", user=f"user-{i}", key_id="key")
        name = f"user-{i}".encode()
        start_s = time.perf_counter()
        assigner.assign(visit, now_s=0.0)
        middle_s = time.perf_counter()
        blake2b(name, digest_size=8).digest()
        hash_us.append((time.perf_counter() - middle_s) * 1e6)
        assign_us.append((middle_s - start_s) * 1e6)
    num_requests = 10_000 if quick else 100_000
    observed = _observations(num_requests)
    start_s, cpu_s = time.perf_counter(), time.process_time()
    analyse(_reported(), observed)
    report_s, report_cpu_s = time.perf_counter() - start_s, time.process_time() - cpu_s
    p50_us = float(np.median(assign_us))
    return [
        {
            "name": "experiment assignment, p50, five arms and a holdout",
            "unit": "µs",
            "ceiling": round(float(np.median(hash_us)), 2),
            "target": TARGET_US,
            "measured": round(p50_us, 2),
            "p99": round(float(np.quantile(assign_us, 0.99)), 2),
            "ok": p50_us <= TARGET_US,
        },
        {
            "name": "experiment report, without reading the ledger",
            "unit": "s",
            "measured": round(report_s, 3),
            "cpu_s": round(report_cpu_s, 3),
            "requests": num_requests,
        },
    ]


def _reported() -> Experiment:
    return Experiment(
        name="bench",
        arms=(
            Arm(name="control", policy="a", weight=0.5),
            Arm(name="new", policy="b", weight=0.5),
        ),
        secondary=("usd", "latency_s"),
        guardrails=(Guardrail(metric="error_rate", limit=0.02),),
        covariates=("prompt_tokens",),
    )


def _observations(num: int) -> Observations:
    """Return five requests each of `num` / 5 users (seed 0)."""
    rng = np.random.default_rng(0)
    unit = np.repeat(np.arange(num // 5), 5)
    return Observations(
        arms=arm_names(_reported()),
        arm=(unit * 2_654_435_761 >> 16) % 2,
        unit=unit,
        propensity=np.full(num, 0.5),
        time_s=np.arange(num, dtype=np.float64),
        columns={
            "quality": rng.integers(0, 2, num).astype(np.float64),
            "usd": rng.gamma(2, 1e-6, num),
            "latency_s": rng.gamma(2, 0.2, num),
            "error_rate": np.zeros(num),
            "prompt_tokens": rng.integers(5, 500, num).astype(np.float64),
        },
    )
