"""Ways of training an adapter, side by side: plain LoRA, ID3, MonteCLoRA with its draws fused, and
a deep ensemble of plain ones, which costs as many trainings: `python -m tests.bench.adapter_ways`.

On the shipped base and folders of real text that it does not know, few and gone through many times
over: where a posterior or fewer parameters might help. Loss in nats per token of documents that are
held out, mean over corpora and seeds, and the difference to plain LoRA of the same corpus and seed
with twice its standard error. All runs of a seed see the same tokens in the same order.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.downscale.adapt import adapt
from models.downscale.adapters import method_of, training_of
from models.downscale.chunks import untrained
from models.downscale.examples import conversations
from models.downscale.recipe import Recipe
from models.downscale.stage import Run
from models.pool import DEFAULT_POOL
from models.tasks.base import Split
from models.training.data import Conversation
from models.training.forward import Scorer, answer_loss, target_log_probabilities
from models.training.monte_carlo import drawn, posteriors
from policies.files import write_atomic
from tests.bench.harness import RESULTS, environment

ROW_TOKENS, NUM_HELD_OUT, NUM_DRAWS = 64, 200, 4
WAYS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "unmask, share .25, exponent 0": {"unmask": {"share": 0.25, "exponent": 0.0}},
    "unmask, share .25, exponent 1": {"unmask": {"share": 0.25, "exponent": 1.0, "epsilon": 0.01}},
    "unmask, share .05, exponent 0": {"unmask": {"share": 0.05, "exponent": 0.0}},
    "monte_carlo, deviation .01": {"monte_carlo": {"deviation": 0.01}},
    "monte_carlo, deviation .03": {"monte_carlo": {"deviation": 0.03}},
}


def losses_of(corpus: Path, seed: int, tokens: int, work: Path) -> dict[str, float]:
    """The held-out losses of every way on one corpus, by what is asked."""
    found: dict[str, float] = {}
    said_plain = []
    for way, settings in WAYS.items():
        # The deep ensemble's members differ by where they start and by the order of what they see.
        for member in range(NUM_DRAWS if way == "plain" else 1):
            run = _run(corpus, seed + 1000 * member, tokens, settings, work)
            model = _trained(run)
            held_out = conversations(run, "own", Split.TEST)[:NUM_HELD_OUT]
            said = said_by(model, held_out)
            if member == 0:
                found[way] = answer_loss(held_out, said)
            if way == "plain":
                said_plain.append(said)
        if posteriors(model):
            draws = []
            for number in range(1, NUM_DRAWS + 1):
                with drawn(model, seed=seed, draw=-number):
                    draws.append(said_by(model, held_out))
            found[f"{way}: one draw"] = answer_loss(held_out, draws[0])
            found[f"{way}: {NUM_DRAWS} draws fused"] = answer_loss(held_out, fused(draws))
    found[f"deep ensemble of {NUM_DRAWS} plain"] = answer_loss(held_out, fused(said_plain))
    return found


def _run(corpus: Path, seed: int, tokens: int, way: Mapping[str, Any], work: Path) -> Run:
    recipe = {
        "name": "ways",
        "seed": seed,
        "base": {"checkpoint": str(DEFAULT_POOL / "base")},
        # A recipe has two domains; only one is trained on.
        "domains": {"own": {"corpus": str(corpus)}, "other": {"corpus": "tasks:dates"}},
        "members": {"adapters": {"rank": 16, **way}},
        "adapt": {
            "tokens": tokens, "general_share": 0.0, "rows_per_step": 4, "row_tokens": ROW_TOKENS,
            "compiled": False, "precision": "float32", "device": "cpu",
        },
    }  # fmt: skip
    return Run(Recipe.model_validate(recipe), work, report=lambda _: None)


def _trained(run: Run) -> Any:
    model = copy.deepcopy(untrained(run, "own"))
    settings = training_of(run, run.recipe.adapt)
    adapt(
        model,
        conversations(run, "own", Split.TRAIN),
        (),
        general_share=0.0,
        tokens=settings.tokens,
        settings=settings,
        seed=run.recipe.seed,
        method=method_of(run),
    )
    return model


def said_by(model: Any, examples: Sequence[Conversation]) -> list[Any]:
    """The log-probability of every target of the examples."""
    scorer = Scorer(model, row_tokens=128)
    return [logs for (logs,) in scorer.map(examples, target_log_probabilities)]


def fused(said: Sequence[Sequence[Any]]) -> list[Any]:
    """The uniform mixture of what several say of the same targets."""
    return [
        np.logaddexp.reduce(logs, axis=0) - math.log(len(said)) for logs in zip(*said, strict=True)
    ]


def main() -> None:
    """Run all, and print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpora", nargs="+", type=Path, help="folders of text")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=200_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as work:
        for seed in range(options.seeds):
            for corpus in options.corpora:
                rows.append(losses_of(corpus, seed, options.tokens, Path(work) / corpus.name))
                _print(rows)
                result = {
                    "environment": environment(),
                    "corpora": [corpus.name for corpus in options.corpora],
                    "tokens": options.tokens,
                    "losses": rows,
                }
                write_atomic(RESULTS / "adapter-ways.json", json.dumps(result, indent=1) + "\n")


def _print(rows: Sequence[Mapping[str, float]]) -> None:
    sys.stdout.write(f"\n{len(rows)} runs\n")
    for way in rows[0]:
        gaps = [row[way] - row["plain"] for row in rows]
        spread = 2 * statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
        mean = statistics.fmean(row[way] for row in rows)
        sys.stdout.write(f"{way:42} {mean:.4f}  {statistics.fmean(gaps):+.4f} ± {spread:.4f}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
