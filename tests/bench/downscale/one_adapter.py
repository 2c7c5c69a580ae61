"""Four adapters, routed and fused, against one adapter of as much training on all their corpora.

    python -m tests.bench.downscale.one_adapter RECIPE OUT [--seeds 1 2 3]

RECIPE's members are adapters, on texts (`smollm2-adapters.yaml`). For each seed its stages make
them and their policies; beside them one adapter is trained on all corpora for as many tokens as all
members together, at the members' rank and at as many parameters as theirs together. All are asked
the same held-out pieces: nats per byte, with 95% intervals by bootstrap over pieces within each
domain and seed, paired. What is made is kept in OUT and not made again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from models.downscale.adapt import adapt
from models.downscale.adapters import adapted_base, keep_adapter, training_of
from models.downscale.answers import measure_model, members_measured, read_measured
from models.downscale.chunks import BASE
from models.downscale.examples import conversations
from models.downscale.members import member, train_chunk
from models.downscale.pipeline import claimed
from models.downscale.policies import policies_of
from models.downscale.questions import questions
from models.downscale.recipe import Recipe, read_recipe
from models.downscale.stage import Run, read_json, write_json
from models.downscale.teachers import ADAPT_FILE
from models.tasks.base import Split

NUM_RESAMPLES = 2000
OWN = "its domain's own"

Floats: TypeAlias = NDArray[np.float64]
Losses: TypeAlias = dict[str, list[Floats]]
"""By system, for each domain of each seed: nats per byte of each test piece."""


def with_rank(recipe: Recipe, rank: int) -> Recipe:
    """The recipe with members of another rank."""
    assert recipe.members.adapters is not None
    adapters = recipe.members.adapters.model_copy(update={"rank": rank})
    members = recipe.members.model_copy(update={"adapters": adapters})
    return recipe.model_copy(update={"members": members})


def train_one(run: Run, recipe: Recipe, folder: Path) -> None:
    """Train one adapter of `recipe` on everything, and measure it as `run`'s members are."""
    if (folder / ADAPT_FILE).exists():
        return
    alone = Run(recipe, folder / "work", report=run.report)
    model = adapted_base(alone)
    result = adapt(
        model,
        [one for domain in run.domains for one in conversations(run, domain, Split.TRAIN)],
        (),
        general_share=0.0,
        tokens=len(run.domains) * recipe.adapt.tokens,
        settings=training_of(alone, recipe.adapt),
        seed=recipe.seed,
        folder=folder / "training",
        distill=False,
        report=lambda line: run.report(f"{folder.name}: {line}"),
    )
    keep_adapter(alone, model, folder, "all")
    measure_model(run, folder, "all", folder, questions(run), base=member(run, BASE))
    write_json(folder / ADAPT_FILE, {"flops": result.flops, "tokens": result.tokens})


def ask_all(run: Run, recipe: Recipe, folder: Path) -> tuple[Losses, dict[str, Any]]:
    """Make, train and ask everybody; returns the losses, and what training took."""
    members, played = members_measured(run), policies_of(run)["played"]["policies"]
    taken = [read_json(train_chunk(run, name) / ADAPT_FILE) for name in run.domains]
    facts = {"members": {key: sum(one[key] for one in taken) for key in ("flops", "tokens")}}
    tests = [number for number, one in enumerate(questions(run)) if one.is_test]
    domain_Q = np.array([questions(run)[number].domain for number in tests])
    scores = {name: members[name].score_Q[tests] for name in (*run.domains, BASE)}
    own_Q = np.choose([run.domains.index(name) for name in domain_Q], list(scores.values())[:-1])
    scores = {BASE: scores[BASE], OWN: own_Q}
    scores |= {name: np.array(one["scores"]) for name, one in played.items()}
    assert recipe.members.adapters is not None
    for rank in (recipe.members.adapters.rank, len(run.domains) * recipe.members.adapters.rank):
        name = f"one of rank {rank}"
        train_one(run, with_rank(recipe, rank), folder / name.replace(" ", "-"))
        facts[name] = read_json(folder / name.replace(" ", "-") / ADAPT_FILE)
        scores[name] = read_measured(name, folder / name.replace(" ", "-")).score_Q[tests]
    return {
        name: [-np.log(score_Q[domain_Q == domain]) for domain in run.domains]
        for name, score_Q in scores.items()
    }, facts


def mean_of(parts: list[Floats], chosen: list[NDArray[np.int64]] | None = None) -> float:
    """The mean over domains and seeds of the pieces' means, of the `chosen` pieces."""
    chosen = chosen or [np.arange(len(part)) for part in parts]
    return float(np.mean([part[rows].mean() for part, rows in zip(parts, chosen, strict=True)]))


def interval(parts: list[Floats]) -> list[float]:
    """95% of the mean by bootstrap over pieces, within each domain and seed."""
    rng = np.random.default_rng(0)
    sizes = [len(part) for part in parts]
    drawn = [
        mean_of(parts, [rng.integers(size, size=size) for size in sizes])
        for _ in range(NUM_RESAMPLES)
    ]
    return [round(float(edge), 4) for edge in np.quantile(drawn, (0.025, 0.975))]


def table(losses: Losses, domains: tuple[str, ...]) -> Mapping[str, Any]:
    """Every system: per domain, the mean, and what it loses less than each single adapter."""
    found: dict[str, Any] = {}
    for name, parts in losses.items():
        by_domain = {
            domain: round(mean_of(parts[at :: len(domains)]), 4)
            for at, domain in enumerate(domains)
        }
        found[name] = {**by_domain, "mean": round(mean_of(parts), 4), "interval": interval(parts)}
        for rival in (other for other in losses if other.startswith("one of") and other != name):
            less = [one - other for one, other in zip(parts, losses[rival], strict=True)]
            found[name][f"beside {rival}"] = [round(mean_of(less), 4), *interval(less)]
    return found


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.downscale.one_adapter")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--threads", type=int, help="CPU threads")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    losses: Losses = {}
    facts: dict[str, Any] = {}
    report: Callable[[str], None] = partial(print, flush=True)
    for seed in arguments.seeds:
        recipe = read_recipe(arguments.recipe).model_copy(update={"seed": seed})
        folder = arguments.out / f"seed-{seed}"
        with claimed(folder, resume=True) as work:
            told, facts[str(seed)] = ask_all(Run(recipe, work, report=report), recipe, folder)
        for name, parts in told.items():
            losses.setdefault(name, []).extend(parts)
        result = {"bench": "one-adapter", "training": facts, "nats per byte": {}}
        result["nats per byte"] = table(losses, tuple(recipe.domains))
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
