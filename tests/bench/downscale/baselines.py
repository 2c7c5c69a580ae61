"""What the chunks are compared with, each trained or made exactly as they are but for one thing.

finetuned   the base, trained on all their corpora for as many tokens as they together
scratch     chunks of fresh weights, trained for as many tokens as the cut ones
average     the chunks merged into one model of the base's size, by the mean of what they learnt
ties        the same by TIES-Merging

Comparisons of choices within the pipeline (selection, pruning, distillation) are in `variants`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from models.downscale.adapt import adapt
from models.downscale.answers import measure_model, read_measured
from models.downscale.chunks import CUT_FILE, cut_out, load_model, loss_on
from models.downscale.corpora import GENERAL
from models.downscale.examples import conversations
from models.downscale.figures import System, training_facts
from models.downscale.members import general_share, train_chunk
from models.downscale.questions import questions
from models.downscale.stage import Run, read_json, stage, write_json
from models.downscale.teachers import ADAPT_FILE, trained_base, training_data
from models.downscale.vocabulary import base_model
from models.tasks.base import Split
from models.training.checkpoint import export_checkpoint
from tests.bench.downscale.merge import Descendant, merge

FINETUNED, SCRATCH = "finetuned", "scratch"
MERGED = ("average", "ties")
# The share of the merged task vectors that is added; the best on held-out examples is taken.
SCALES = (0.3, 0.6, 1.0)
NUM_JUDGED = 800


def finetuned(run: Run) -> Path:
    """The base trained on for as many tokens as all chunks together."""
    return trained_base(run, sum(run.recipe.adapt_of(domain).tokens for domain in run.domains))


@stage("scratch")
def scratch(run: Run, folder: Path, domain: str) -> None:
    """Stage: a chunk of fresh weights, trained like the cut one."""
    share, settings = general_share(run), run.recipe.adapt_of(domain)
    model = fresh_like(load_model(cut_out(run, domain)), seed=run.recipe.seed)
    result = adapt(
        model,
        training_data(run, domain),
        training_data(run, GENERAL),
        general_share=share,
        tokens=settings.tokens,
        settings=settings,
        seed=run.recipe.seed,
        folder=folder / "training",
        distill=False,
        report=lambda line: run.report(f"scratch/{domain}: {line}"),
    )
    _export(run, model, folder)
    write_json(folder / ADAPT_FILE, {**asdict(result), "general_share": share})


@stage("merged")
def merged(run: Run, folder: Path, method: str) -> None:
    """Stage: the chunks merged into one model of the base's size."""
    base = base_model(run)[0]
    chunks = [
        Descendant(
            adapted=load_model(train_chunk(run, domain)),
            cut=load_model(cut_out(run, domain)),
            kept=read_json(cut_out(run, domain) / CUT_FILE),
        )
        for domain in run.domains
    ]
    judged = conversations(run, GENERAL, Split.ROUTER)[:NUM_JUDGED]
    models = {scale: merge(base, chunks, method=method, scale=scale) for scale in SCALES}
    losses = {scale: loss_on(run, judged, model) for scale, model in models.items()}
    best = min(losses, key=losses.__getitem__)
    _export(run, models[best], folder)
    write_json(folder / "merge.json", {"scale": best, "losses": losses})


@stage("compared")
def compared(run: Run, folder: Path, name: str) -> None:
    """Stage: a baseline's answers to the test questions, a fresh chunk's to its own domain's."""
    source, _, domain = name.partition("-")
    tests = [question for question in questions(run) if question.is_test]
    if source == SCRATCH:
        checkpoint = scratch(run, domain)
        tests = [question for question in tests if question.domain == domain]
    else:
        checkpoint = finetuned(run) if source == FINETUNED else merged(run, source)
    measure_model(run, folder, name, checkpoint, tests)


def baseline_systems(run: Run, baselines: Sequence[str]) -> dict[str, System]:
    """The baselines of those names, as systems beside the pool's."""
    domain_Q = [question.domain for question in questions(run) if question.is_test]
    base_parameters = base_model(run)[0].num_parameters()
    found = []
    for name in baselines:
        if name == SCRATCH:
            score_Q = np.zeros(len(domain_Q))
            for domain in run.domains:
                own = [i for i, one in enumerate(domain_Q) if one == domain]
                score_Q[own] = _scores(run, f"{SCRATCH}-{domain}")
            size = load_model(cut_out(run, run.domains[0])).num_parameters()
            found.append(_system("from scratch (by domain)", "scratch", score_Q, size))
        elif name == FINETUNED:
            found.append(_system(name, "base", _scores(run, name), base_parameters))
        elif name in MERGED:
            label = f"merged ({name})"
            found.append(_system(label, "merged", _scores(run, name), base_parameters))
    return {system.name: system for system in found}


def baseline_training(run: Run, baselines: Sequence[str]) -> dict[str, Any]:
    """What the baselines' trainings took."""
    folders = {}
    if FINETUNED in baselines:
        folders[FINETUNED] = finetuned(run)
    if SCRATCH in baselines:
        folders |= {f"{SCRATCH}-{domain}": scratch(run, domain) for domain in run.domains}
    return {
        name: {
            "parameters": load_model(folder).num_parameters(),
            "lineage": "the base, trained on"
            if name == FINETUNED
            else "a chunk's shape with fresh weights",
            **training_facts(read_json(folder / ADAPT_FILE)),
        }
        for name, folder in folders.items()
    }


def fresh_like(model: PreTrainedModel, *, seed: int) -> PreTrainedModel:
    """A model of the same shape with fresh weights; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)


def _scores(run: Run, name: str) -> np.ndarray:
    return read_measured(name, compared(run, name)).score_Q


def _system(name: str, kind: str, score_Q: np.ndarray, parameters: float) -> System:
    nothing = np.zeros(len(score_Q))  # no pool file gives it a price
    return System(name=name, kind=kind, score_Q=score_Q, usd_Q=nothing, parameters=parameters)


def _export(run: Run, model: PreTrainedModel, folder: Path) -> None:
    export_checkpoint(model.to(torch.bfloat16), base_model(run)[1], folder)
