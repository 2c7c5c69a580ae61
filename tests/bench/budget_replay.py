"""A day of LLMRouter's questions under a gCO2e target: the controller against the offline optimum.

    python -m tests.bench.budget_replay [FOLDER]

Nine open models of 7B to 70B answered 5,989 questions (train, and test without the questions that
also stand in train). Real: questions, scores, prices. Modelled: energy of an H200 by LLMCarbon.
Simulated: arrivals, a grid with Germany's mean and a solar rhythm, answer lengths (log-normal, mean
200 tokens), which the data lacks. Every strategy sees the same cross-fitted predictions (TF-IDF,
ridge); the optimum sees the whole day, real answer lengths included.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np

from policies.base import ModelFacts
from policies.budget.replay import replay_day
from policies.budget.replay.offline import offline_optimum
from policies.budget.replay.plot import draw
from policies.budget.replay.scenarios import adversarial, ordinary, scene_of, target_between
from policies.budget.replay.scene import day_costs
from policies.carbon import find_zone
from policies.carbon.settings import CarbonSettings
from policies.footprint import Rates
from policies.outcomes import score_table
from policies.outcomes.importers import import_llmrouter, read_llmrouter_prices
from router.cli.replay_budget import table

FOLDER = Path(__file__).parents[3] / "shared" / "data" / "routing" / "LLMRouter"
DOCS = Path(__file__).parents[2] / "docs" / "budget"
NUM_REQUESTS = 3_000
SHARES = (0.1, 0.3, 0.6)
# Nothing was tuned on this seed.
SEED = 100


def main(folder: Path) -> None:
    """Replay, print the tables and write docs/budget."""
    outcomes = [o for o in import_llmrouter(folder) if o.split in ("train", "test")]
    prices = read_llmrouter_prices(folder / "example_data/llm_candidates/default_llm.json")
    models = {}
    for name in score_table(outcomes).models:
        size = re.search(r"(\d+)b", name)
        assert size is not None
        usd = prices[name] / 1e6
        models[name] = ModelFacts(
            name=name,
            parameters=int(size[1]) * 10**9,
            rates=Rates(usd_per_input_token=usd, usd_per_output_token=usd),
        )
    carbon = CarbonSettings.model_validate(
        {"zone": "DE", "pue": 1.1, "hardware": {"device": "h200"}}
    )
    mean = find_zone("DE").gco2e_per_kwh
    scene = scene_of(outcomes, models, carbon, seed=SEED)
    usual = ordinary(scene, num_requests=NUM_REQUESTS, mean_gco2e_per_kwh=mean, seed=SEED)
    rows = []
    scenarios = [(usual, share) for share in SHARES]
    middle = SHARES[1]
    scenarios += [
        (scenario, middle)
        for scenario in adversarial(
            scene, num_requests=NUM_REQUESTS, mean_gco2e_per_kwh=mean, seed=SEED
        )
    ]
    for scenario, share in scenarios:
        target = target_between(scene, usual.day, "gco2e", share=share)
        replayed = replay_day(
            scene,
            scenario.day,
            target,
            yesterday=scenario.yesterday,
            learned=scenario.learned,
            seed=SEED,
        )
        title = f"{scenario.name}, target at {share:.0%}: {target.amount:.4g} gCO2e/h"
        print(f"\n{title}, {replayed.num_requests} requests\n{table(replayed)}", flush=True)
        rows += [
            {
                "scenario": scenario.name,
                "share": share,
                "target_gco2e_per_hour": target.amount,
                "requests": replayed.num_requests,
                "strategy": result.name,
                "spent_share": round(result.spent_share, 5),
                "predicted_quality": round(result.predicted_quality, 5),
                "quality_share": round(result.quality_share, 5),
                "actual_quality": round(result.actual_quality, 5),
                "actual_quality_share": round(result.actual_quality_share, 5),
            }
            for result in replayed.results
        ]
        if scenario is usual and share == middle:
            draw(replayed, DOCS / "day.png")
            day = scenario.day
            actual = scene.actual_QM[day.queries]
            costs = day_costs(scene, day, "gco2e")
            oracle = offline_optimum(actual, costs, day.available_NM, budget=replayed.budget)
            quality = float((oracle * actual).sum() / len(day))
            print(f"an oracle that knows every answer beforehand: {quality:.4f}")
            rows.append({"scenario": "oracle", "share": share, "actual_quality": round(quality, 5)})
        (DOCS / "replay.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\nmean score of the best single model {np.max(scene.actual_QM.mean(axis=0)):.4f}")


if __name__ == "__main__":
    DOCS.mkdir(parents=True, exist_ok=True)
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
