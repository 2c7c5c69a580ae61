"""What the chunks are compared with, each trained or made exactly as they are but for one thing.

finetuned   the base, trained on all their corpora for as many tokens as they together
scratch     chunks of fresh weights, trained for as many tokens as the cut ones
average     the chunks merged into one model of the base's size, by the mean of what they learnt
ties        the same by TIES-Merging

Comparisons of choices within the pipeline (selection, pruning) are in `variants`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from models.downscale.adapt import adapt
from models.downscale.merge import Descendant, Method, merge
from models.downscale.mixture import general_share
from models.downscale.run import ADAPT_FILE, CUT_FILE, GENERAL, Run, save_chunk
from models.downscale.stage import write_json
from models.tasks import Split

FINETUNED: Final = "finetuned"
SCRATCH: Final = "scratch"
MERGED: Final[tuple[Method, ...]] = ("average", "ties")
MERGE_FILE: Final = "merge.json"
# The share of the merged task vectors that is added; the best on held-out examples is taken.
_SCALES: Final = (0.3, 0.6, 1.0)
_NUM_JUDGED: Final = 800


def run_baselines(run: Run, *, upstream: Sequence[str]) -> list[str]:
    """Stages "baselines/…" for what the recipe names; returns the names of the stages."""
    stages: list[str] = []
    wanted = run.recipe.baselines
    if FINETUNED in wanted:
        stages.append(_finetuned(run))
    if SCRATCH in wanted:
        stages += [_scratch(run, domain, upstream) for domain in run.domains]
    stages += [_merged(run, method) for method in MERGED if method in wanted]
    return stages


def _finetuned(run: Run) -> str:
    recipe, name = run.recipe, f"baselines/{FINETUNED}"
    tokens = sum(recipe.adapt_of(domain).tokens for domain in run.domains)
    usual = len(run.domains) * recipe.adapt.tokens
    changes = {
        # As many steps as a chunk has, or a few more: the base's batch is larger.
        "rows_per_step": 4 * recipe.adapt.rows_per_step,
        # As long a warm-up as if no chunk had tokens of its own (see `Recipe.adapt_of`).
        "warmup_share": min(1.0, recipe.adapt.warmup_share * usual / tokens),
    }

    def action(folder: Path) -> None:
        model = run.fresh_base()
        result = adapt(
            model,
            [one for domain in run.domains for one in run.conversations(domain)],
            (),
            general_share=0.0,
            tokens=tokens,
            settings=recipe.adapt.model_copy(update=changes),
            seed=recipe.seed,
            folder=folder,
            distill=False,
            report=lambda line: run.report(f"{name}: {line}"),
        )
        save_chunk(model, run.tokenizer, folder)
        write_json(folder / ADAPT_FILE, asdict(result))

    facts = {"adapt": recipe.adapt.model_dump(), "tokens": tokens, "seed": recipe.seed}
    upstream = ["base", *(f"corpora/{domain}" for domain in run.domains)]
    run.stages.run(name, action, settings=facts, upstream=upstream)
    return name


def _scratch(run: Run, domain: str, upstream: Sequence[str]) -> str:
    recipe, name = run.recipe, f"baselines/{SCRATCH}/{domain}"
    share, settings = general_share(run), recipe.adapt_of(domain)

    def action(folder: Path) -> None:
        model = fresh_like(run.chunk(domain, stage="cut"), seed=recipe.seed)
        result = adapt(
            model,
            run.lessons[domain],
            run.lessons[GENERAL],
            general_share=share,
            tokens=settings.tokens,
            settings=settings,
            seed=recipe.seed,
            folder=folder,
            distill=False,
            report=lambda line: run.report(f"{name}: {line}"),
        )
        save_chunk(model, run.tokenizer, folder)
        write_json(folder / ADAPT_FILE, {**asdict(result), "general_share": share})

    facts = {"adapt": settings.model_dump(), "general_share": share, "seed": recipe.seed}
    run.stages.run(name, action, settings=facts, upstream=[f"cut/{domain}", *upstream])
    return name


def _merged(run: Run, method: Method) -> str:
    name = f"baselines/{method}"

    def action(folder: Path) -> None:
        chunks = [_descendant(run, domain) for domain in run.domains]
        judged = run.conversations(GENERAL, Split.ROUTER)[:_NUM_JUDGED]
        models = {s: merge(run.base, chunks, method=method, scale=s) for s in _SCALES}
        losses = {scale: run.loss(model, judged) for scale, model in models.items()}
        best = min(losses, key=losses.__getitem__)
        save_chunk(models[best], run.tokenizer, folder)
        write_json(folder / MERGE_FILE, {"scale": best, "losses": losses})

    upstream = ["base", *(f"adapt/{domain}" for domain in run.domains)]
    run.stages.run(name, action, settings={"scales": _SCALES}, upstream=upstream)
    return name


def _descendant(run: Run, domain: str) -> Descendant:
    kept: dict[str, Any] = json.loads((run.stages.folder(f"cut/{domain}") / CUT_FILE).read_text())
    return Descendant(adapted=run.chunk(domain), cut=run.chunk(domain, stage="cut"), kept=kept)


def fresh_like(model: PreTrainedModel, *, seed: int) -> PreTrainedModel:
    """A model of the same shape with fresh weights; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            model.config, dtype=torch.float32
        )
    assert isinstance(fresh, PreTrainedModel)
    return fresh
