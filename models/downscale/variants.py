"""Choices within the pipeline, each compared with its alternative at equal budget.

"selection": examples chosen by uncertainty against as many chosen by lot. "pruning": parts kept
by activation against parts kept by the spectrum of the weights. Everything else is equal, and both
sides are trained alike, for a few domains and fewer tokens than the chunks get.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TypedDict

from transformers import PreTrainedModel

from models.downscale.architecture import shape_of
from models.downscale.cut import cut
from models.downscale.run import GENERAL, Run
from models.downscale.select import select_at_random
from models.downscale.spectrum import spectrum_importance
from models.downscale.stage import write_json
from models.downscale.trials import trial
from models.tasks import Split
from models.training.data import Conversation

VARIANTS_FILE: Final = "variants.json"
_NUM_SEEDS: Final = 2

# A model and its training conversations, for one seed.
Side = Callable[[int], tuple[PreTrainedModel, Sequence[Conversation]]]


class Result(TypedDict):
    """Held-out loss on the domain, in nats per answer token, of one variant for one seed."""

    comparison: str
    variant: str
    domain: str
    seed: int
    tokens: int
    loss: float


def run_variants(run: Run, *, upstream: Sequence[str]) -> list[str]:
    """Stages "variants/<comparison>/<domain>"; returns their names."""
    comparisons: dict[str, Callable[[Run, str], dict[str, Side]]] = {}
    if "random" in run.recipe.baselines and run.recipe.select.keep < 1:
        comparisons["selection"] = _selections
    if "spectrum" in run.recipe.baselines:
        comparisons["pruning"] = _prunings
    return [
        _compare(run, comparison, domain, sides, upstream)
        for comparison, sides in comparisons.items()
        for domain in run.domains[: run.recipe.laws.mixture_domains]
    ]


def read_variants(run: Run, stages: Sequence[str]) -> list[Result]:
    """What the stages found."""
    found: list[Result] = []
    for stage in stages:
        found += json.loads((run.stages.folder(stage) / VARIANTS_FILE).read_text())["results"]
    return found


def _selections(run: Run, domain: str) -> dict[str, Side]:
    everything, chosen = run.conversations(domain), run.selected(domain)

    def by_lot(seed: int) -> list[Conversation]:
        lot = select_at_random(len(everything), keep=len(chosen) / len(everything), seed=seed)
        return [everything[i] for i in lot.kept]

    return {
        "selected": lambda _: (run.chunk(domain, stage="cut"), chosen),
        "random": lambda seed: (run.chunk(domain, stage="cut"), by_lot(seed)),
    }


def _prunings(run: Run, domain: str) -> dict[str, Side]:
    chosen = run.selected(domain)
    shape = shape_of(run.chunk(domain, stage="cut").config)
    importance = {
        "activation": partial(run.importance, domain),
        "spectrum": partial(spectrum_importance, run.base),
    }
    return {
        name: lambda _, score=score: (cut(run.base, score(), shape)[0], chosen)  # type: ignore[misc]
        for name, score in importance.items()
    }


def _compare(
    run: Run,
    comparison: str,
    domain: str,
    sides: Callable[[Run, str], dict[str, Side]],
    upstream: Sequence[str],
) -> str:
    recipe, name = run.recipe, f"variants/{comparison}/{domain}"
    after_tokens = recipe.laws.mixture_tokens
    judged = run.conversations(domain, Split.ROUTER)

    def action(folder: Path) -> None:
        results: list[Result] = []
        for variant, side in sides(run, domain).items():
            for seed in range(recipe.seed, recipe.seed + _NUM_SEEDS):
                model, own = side(seed)
                judge = partial(run.loss, conversations=judged)
                facts = {"comparison": comparison, "variant": variant, "domain": domain}
                results.append(Result(**facts, seed=seed, tokens=0, loss=judge(model)))  # type: ignore[typeddict-item]
                found = trial(
                    model,
                    own,
                    run.conversations(GENERAL),
                    {"loss": judge},
                    general_share=0.1,
                    after_tokens=after_tokens,
                    settings=recipe.adapt,
                    seed=seed,
                    distill=False,
                )
                for one in found:
                    result = Result(
                        **facts,
                        seed=seed,
                        tokens=one.tokens,
                        loss=one.losses["loss"],  # type: ignore[typeddict-item]
                    )
                    results.append(result)
        write_json(folder / VARIANTS_FILE, {"results": results})
        run.report(f"{name}: " + ", ".join(_last(results, v) for v in sides(run, domain)))

    facts: dict[str, Any] = {
        "adapt": recipe.adapt.model_dump(),
        "tokens": after_tokens,
        "seed": recipe.seed,
        "shape": recipe.members.model_dump(),
    }
    run.stages.run(name, action, settings=facts, upstream=upstream)
    return name


def _last(results: Sequence[Result], variant: str) -> str:
    mine = [result for result in results if result["variant"] == variant]
    most = max(result["tokens"] for result in mine)
    losses = [result["loss"] for result in mine if result["tokens"] > 0.9 * most]
    return f"{variant} {sum(losses) / len(losses):.4f}"
