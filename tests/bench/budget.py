"""What the budget controller adds to a routing decision.

Nine models with predicted scores, one gCO2e target, prices warmed up; then the same with eight
fusible members and the ensemble law. Each decision includes counting the request and keeping its
candidates as a sample. Prices are solved between requests, as the server does in a thread of its
own; what that takes is reported, too.
"""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np

from policies.base import Decision, ModelFacts, Query
from policies.budget import Controller, Target
from policies.carbon import find_device, rates_for
from policies.footprint import Footprint, Rates
from policies.laws import EnsembleLaw
from policies.plan import Answer

TARGET_US = 100.0


def run(quick: bool) -> list[dict[str, Any]]:
    """Time decisions of both kinds; settling is not part of the request's path."""
    num = 1_000 if quick else 10_000
    alone = _decisions(num, num_models=9, groups=(), law=None)
    names = tuple(f"m{index}" for index in range(8))
    law = EnsembleLaw(L0=0.4, a=0.8, b=0.2)
    fused = _decisions(num, num_models=8, groups=(names,), law=law)
    return [
        {
            "name": f"budget decision, p50, {what}",
            "unit": "µs",
            "target": TARGET_US,
            "measured": round(float(np.median(wall_us)), 1),
            "cpu_p50_us": round(float(np.median(cpu_us)), 1),
            "p99_us": round(float(np.quantile(wall_us, 0.99)), 1),
            "solve_p50_ms": round(float(np.median(solve_ms)), 1),
            "decisions": num,
            "ok": bool(np.median(wall_us) <= TARGET_US),
        }
        for what, (wall_us, cpu_us, solve_ms) in (
            ("nine models", alone),
            ("eight models, ensembles of up to eight", fused),
        )
    ]


def _decisions(
    num: int, *, num_models: int, groups: tuple[tuple[str, ...], ...], law: EnsembleLaw | None
) -> tuple[list[float], list[float], list[float]]:
    """Return wall and CPU microseconds of `num` decisions, milliseconds of solutions (seed 0)."""
    rng = random.Random(0)
    price = Rates(usd_per_input_token=1e-7, usd_per_output_token=2e-7)
    device = find_device("h200")
    models = {}
    for index in range(num_models):
        facts = ModelFacts(name=f"m{index}", rates=price, parameters=(index + 1) * 10**9)
        rates = rates_for(facts, device, gco2e_per_kwh=380.0, pue=1.1)
        models[facts.name] = ModelFacts(name=facts.name, rates=rates)
    now_s = 0.0
    controller = Controller(
        models=models,
        clock=lambda: now_s,
        targets=[Target(resource="gco2e", amount=1.0, per="1000_requests")],
        law=law,
        groups=groups,
    )
    wall_us, cpu_us, solve_ms = [], [], []
    for number in range(num + 500):
        now_s += rng.expovariate(1.0)
        scores = {name: rng.random() for name in models}
        best = max(scores, key=lambda name: scores[name])
        query = Query(text="", prompt_tokens=rng.randint(10, 500), max_tokens=512)
        decision = Decision(plan=Answer(members=(best,)), scores=scores)
        start_s, start_cpu_s = time.perf_counter(), time.thread_time()
        chosen = controller.choose(query, decision)
        cpu_s, wall_s = time.thread_time() - start_cpu_s, time.perf_counter() - start_s
        expected = chosen.details["budget"]["expected"]["gco2e"]
        controller.observe(query, chosen, Footprint(gco2e=expected * rng.uniform(0.3, 1.7)))
        if controller.due():
            start_s = time.perf_counter()
            controller.solve()
            solve_ms.append((time.perf_counter() - start_s) * 1e3)
        if number >= 500:
            wall_us.append(wall_s * 1e6)
            cpu_us.append(cpu_s * 1e6)
    return wall_us, cpu_us, solve_ms


if __name__ == "__main__":
    for row in run(quick=False):
        print(row)
