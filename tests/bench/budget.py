"""What the budget controller adds to a routing decision.

Nine models with predicted scores, one gCO2e target; then the same with eight fusible members and
the ensemble law. Each decision includes counting the request and moving the price.
"""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np

from policies.base import Decision, ModelFacts, Query
from policies.budget.controller import Controller
from policies.budget.prices import BudgetTarget
from policies.carbon.llmcarbon import find_device, rates_for
from policies.footprint import Footprint, Rates
from policies.laws.scaling import EnsembleLaw
from policies.plan import Answer

TARGET_US = 100.0
_WARM_UP = 500


def run(quick: bool) -> list[dict[str, Any]]:
    """Time decisions of both kinds; settling is not part of the request's path."""
    num = 1_000 if quick else 10_000
    rows = []
    for what, num_models, fusible in (
        ("nine models", 9, 0),
        ("eight models, ensembles of up to eight", 8, 8),
    ):
        wall_us, cpu_us = _decisions(num, num_models=num_models, fusible=fusible)
        p50_us = float(np.median(wall_us))
        rows.append(
            {
                "name": f"budget decision, p50, {what}",
                "unit": "µs",
                "target": TARGET_US,
                "measured": round(p50_us, 1),
                "cpu_p50_us": round(float(np.median(cpu_us)), 1),
                "p99_us": round(float(np.quantile(wall_us, 0.99)), 1),
                "decisions": num,
                "ok": p50_us <= TARGET_US,
            }
        )
    return rows


def _decisions(num: int, *, num_models: int, fusible: int) -> tuple[list[float], list[float]]:
    """Decide `num` times (seed 0); return the microseconds, of the clock and of the CPU."""
    rng = random.Random(0)
    wall_us, cpu_us = [], []
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
        targets=[BudgetTarget(resource="gco2e", amount=1.0, per="1000_requests")],
        law=EnsembleLaw(L0=0.4, a=0.8, b=0.2) if fusible else None,
        groups=(tuple(models)[:fusible],) if fusible else (),
    )
    for number in range(num + _WARM_UP):
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
        if number >= _WARM_UP:
            wall_us.append(wall_s * 1e6)
            cpu_us.append(cpu_s * 1e6)
    return wall_us, cpu_us


if __name__ == "__main__":
    for row in run(quick=False):
        print(row)
