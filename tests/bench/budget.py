"""What the budget controller adds to a routing decision.

Nine models with predicted scores, one gCO2e target, prices warmed up; then the same with eight
fusible members and the ensemble law. Each decision includes counting the request and keeping its
candidates as a sample. Prices are solved between requests, and what that takes is reported, too;
then all again with a thread that solves them beside the requests, as the server has one. Requests
come so fast there that it ends a few solutions only: it is at work all the time.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from policies.base import Decision, ModelFacts, Query
from policies.budget import Controller, Target
from policies.carbon import find_device, rates_for
from policies.footprint import Footprint, Rates
from policies.laws import EnsembleLaw
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
        between = _decisions(num, num_models=num_models, fusible=fusible, beside=False)
        beside = _decisions(num, num_models=num_models, fusible=fusible, beside=True)
        p50_us = float(np.median(between.wall_us))
        rows.append(
            {
                "name": f"budget decision, p50, {what}",
                "unit": "µs",
                "target": TARGET_US,
                "measured": round(p50_us, 1),
                "cpu_p50_us": round(float(np.median(between.cpu_us)), 1),
                "p99_us": round(float(np.quantile(between.wall_us, 0.99)), 1),
                "solve_p50_ms": round(float(np.median(between.solve_ms)), 1),
                "beside_a_solver": {
                    "p50_us": round(float(np.median(beside.wall_us)), 1),
                    "p99_us": round(float(np.quantile(beside.wall_us, 0.99)), 1),
                    "solutions": len(beside.solve_ms),
                },
                "decisions": num,
                "ok": p50_us <= TARGET_US,
            }
        )
    return rows


@dataclass
class _Times:
    """What decisions and solutions took."""

    wall_us: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    solve_ms: list[float] = field(default_factory=list)


def _decisions(num: int, *, num_models: int, fusible: int, beside: bool) -> _Times:
    """Decide `num` times (seed 0); prices are solved in between, or `beside` by a thread."""
    rng, times = random.Random(0), _Times()
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
        law=EnsembleLaw(L0=0.4, a=0.8, b=0.2) if fusible else None,
        groups=(tuple(models)[:fusible],) if fusible else (),
    )
    with _solver(controller, times, beside=beside) as between:
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
            between()
            if number >= _WARM_UP:
                times.wall_us.append(wall_s * 1e6)
                times.cpu_us.append(cpu_s * 1e6)
    return times


@contextmanager
def _solver(controller: Controller, times: _Times, *, beside: bool) -> Iterator[Any]:
    """Yield what is to be called after every request; `beside` a thread solves instead."""

    def solve() -> None:
        if controller.due():
            start_s = time.perf_counter()
            controller.solve()
            times.solve_ms.append((time.perf_counter() - start_s) * 1e3)

    if not beside:
        yield solve
        return
    ended = threading.Event()

    def run_until_ended() -> None:
        while not ended.wait(0.001):
            solve()

    thread = threading.Thread(target=run_until_ended)
    thread.start()
    try:
        yield lambda: None
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    for row in run(quick=False):
        print(row)
