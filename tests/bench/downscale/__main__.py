"""Compares a pool with what it might have been: `python -m tests.bench.downscale RECIPE OUT`.

OUT is where `shoal downscale RECIPE --out OUT` made the pool; its stages are read, or made, there,
and the comparisons that `--baselines` names become stages beside them; `--compare` names
`results.json` files of other runs on the same questions. Writes comparisons.{json,md} and plots
into --report (default: OUT/comparisons), and prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from models.downscale.chunks import BASE
from models.downscale.figures import ORACLE, Comparison, collect, describe, systems
from models.downscale.pipeline import claimed
from models.downscale.questions import questions
from models.downscale.recipe import read_recipe
from models.downscale.report import all_tables
from models.downscale.stage import Run, read_json, write_json
from policies.pages import markdown
from tests.bench.downscale.baselines import (
    FINETUNED,
    MERGED,
    SCRATCH,
    baseline_systems,
    baseline_training,
)
from tests.bench.downscale.claims import (
    claims,
    claims_table,
    compression,
    compression_table,
    other_runs,
    proposition,
    proposition_table,
)
from tests.bench.downscale.latency import LATENCY_FILE, latency
from tests.bench.downscale.plots import draw
from tests.bench.downscale.variants import COMPARISONS, results_of

BASELINES = (FINETUNED, SCRATCH, *MERGED, *(one.baseline for one in COMPARISONS.values()))


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.downscale")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--baselines", nargs="*", default=[], choices=BASELINES)
    parser.add_argument("--compare", nargs="*", default=[], metavar="NAME=FILE")
    parser.add_argument("--report", type=Path, help="where the report goes")
    parser.add_argument("--threads", type=int, help="CPU threads")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    report = arguments.report or arguments.out / "comparisons"
    report.mkdir(parents=True, exist_ok=True)
    with claimed(arguments.out, resume=True) as work:
        run = Run(read_recipe(arguments.recipe), work, report=print)
        if taken := set(arguments.baselines) & set(run.domains):
            parser.error(f"--baselines: the recipe has domains of the names {sorted(taken)}")
        others = dict(one.split("=", 1) for one in arguments.compare)
        figures = compare(run, arguments.baselines, others)
    write_json(report / "comparisons.json", figures)
    tables = [claims_table(figures), *all_tables(figures)]
    tables += [proposition_table(figures), compression_table(figures)]
    (report / "comparisons.md").write_text("\n".join(map(markdown, tables)))
    draw(figures, report)
    print(json.dumps({"bench": "downscale", "claims": figures["claims"]}))


def compare(run: Run, baselines: Sequence[str], others: Mapping[str, str]) -> dict[str, object]:
    """The pool's figures with those of everything that it is compared with: `baselines`, and the
    files of `others`."""
    tests = [question for question in questions(run) if question.is_test]
    domain_Q = [question.domain for question in tests]
    comparison = Comparison(domain_Q, seed=run.recipe.seed)
    pool = systems(run)
    every = {**pool, **baseline_systems(run, baselines), **other_runs(others, domain_Q)}
    figures = collect(run)
    curve = figures["fits"]["curves"]["loss/evidence/all"]
    timings = read_json(latency(run) / LATENCY_FILE)["timings"]
    return {
        **figures,
        "systems": describe(every.values(), tests, seed=run.recipe.seed),
        "models": {**figures["models"], **baseline_training(run, baselines)},
        "claims": claims(
            every,
            comparison,
            routed=[ORACLE, "auto"],
            fused=["fused"],
            references=[name for name in every if name == BASE or name.endswith(FINETUNED)],
            curve=curve,
        ),
        "proposition": proposition(
            curve,
            figures["fits"]["pruning"],
            base_parameters=pool[BASE].parameters,
            base_loss=sum(figures["losses"][BASE].values()) / len(figures["losses"][BASE]),
        ),
        "compression": compression(run, pool, timings),
        "timings": timings,
        "variants": results_of(run, baselines),
    }


if __name__ == "__main__":
    main()
