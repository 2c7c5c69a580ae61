"""Choices within the pipeline, each compared with its alternatives at equal budget.

"selection": the examples that an ensemble is most or least sure of, against as many by lot.
"pruning": parts kept by activation against parts kept by the spectrum of the weights.
"distillation": half of the loss from the base's distributions, against labels alone.
All else is equal, and all sides are trained alike, for a few domains and fewer tokens than the
chunks get.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypedDict

import torch
from transformers import PreTrainedModel

from models.downscale.adapt import adapt
from models.downscale.architecture import shape_of
from models.downscale.cut import cut
from models.downscale.recipe import DistillSettings
from models.downscale.run import GENERAL, Run
from models.downscale.select import keep_by, select_at_random, uncertainty
from models.downscale.spectrum import spectrum_importance
from models.downscale.stage import write_json
from models.downscale.teacher import with_lessons, write_lessons
from models.downscale.trials import trial, trial_facts
from models.tasks import Split
from models.training.data import Conversation
from models.training.score import Scorer

VARIANTS_FILE: Final = "variants.json"
_GENERAL_SHARE: Final = 0.1
_ENSEMBLE: Final = 2


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a comparison: the chunk to train and what it is trained on."""

    member: Callable[[], PreTrainedModel]
    own: Sequence[Conversation]


class Result(TypedDict):
    """Held-out loss on the domain, in nats per answer token, of one variant for one seed."""

    comparison: str
    variant: str
    domain: str
    seed: int
    tokens: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What is compared: the sides for a domain and a seed, and how many seeds."""

    name: str
    sides: Callable[[Run, str, int], dict[str, Side]]
    num_seeds: int


def run_variants(run: Run, *, upstream: Sequence[str]) -> list[str]:
    """Stages "variants/<comparison>/<domain>"; returns their names."""
    comparisons: list[Comparison] = []
    if "random" in run.recipe.baselines:
        comparisons.append(Comparison(name="selection", sides=_selections, num_seeds=2))
    if "spectrum" in run.recipe.baselines:
        comparisons.append(Comparison(name="pruning", sides=_prunings, num_seeds=1))
    if "distilled" in run.recipe.baselines:
        comparisons.append(Comparison(name="distillation", sides=_distillations, num_seeds=1))
    return [
        _compare(run, comparison, domain, upstream)
        for comparison in comparisons
        for domain in run.domains[: run.recipe.laws.mixture_domains]
    ]


def read_variants(run: Run, stages: Sequence[str]) -> list[Result]:
    """What the stages found."""
    found: list[Result] = []
    for stage in stages:
        found += json.loads((run.stages.folder(stage) / VARIANTS_FILE).read_text())["results"]
    return found


def _candidates(run: Run, domain: str) -> list[Conversation]:
    return run.conversations(domain)[: run.recipe.laws.variant_examples]


def _selections(run: Run, domain: str, seed: int) -> dict[str, Side]:
    """BALD with an ensemble of the domain's own chunk, trained shortly in different orders."""
    candidates, settings = _candidates(run, domain), run.recipe.laws
    members = []
    for number in range(_ENSEMBLE):
        member = run.chunk(domain, stage="cut")
        adapt(
            member,
            candidates,
            (),
            general_share=0.0,
            tokens=min(settings.mixture_tokens),
            settings=run.recipe.adapt,
            seed=1000 * seed + number,
            distill=False,
        )
        members.append(member)
    scores = uncertainty(members, candidates, by="bald")
    keep = settings.selection_keep
    kept = {
        "most uncertain": keep_by(scores, keep, "hard"),
        "most certain": keep_by(scores, keep, "easy"),
        "by lot": select_at_random(len(candidates), keep=keep, seed=seed).kept,
    }
    fresh = partial(run.chunk, domain, stage="cut")
    return {
        name: Side(member=fresh, own=[candidates[i] for i in indices])
        for name, indices in kept.items()
    }


def _prunings(run: Run, domain: str, seed: int) -> dict[str, Side]:  # noqa: ARG001 - cuts are exact
    shape = shape_of(run.chunk(domain, stage="cut").config)
    scores = {"activation": run.importance(domain), "spectrum": spectrum_importance(run.base)}
    return {
        name: Side(
            member=lambda score=score: cut(run.base, score, shape)[0],  # type: ignore[misc]
            own=_candidates(run, domain),
        )
        for name, score in scores.items()
    }


def _distillations(run: Run, domain: str, seed: int) -> dict[str, Side]:  # noqa: ARG001 - one base
    candidates, settings = _candidates(run, domain), run.recipe.adapt
    scorer = Scorer(
        run.base,
        row_tokens=settings.row_tokens,
        compiled=settings.compiled,
        dtype=torch.bfloat16 if settings.precision == "bfloat16" else torch.float32,
    )
    with TemporaryDirectory() as folder:
        write_lessons(run.base, {domain: candidates}, Path(folder), scorer=scorer)
        taught = with_lessons({domain: candidates}, Path(folder))[domain]
    fresh = partial(run.chunk, domain, stage="cut")
    return {
        "labels and base": Side(member=fresh, own=taught),
        "labels alone": Side(member=fresh, own=candidates),
    }


def _compare(run: Run, comparison: Comparison, domain: str, upstream: Sequence[str]) -> str:
    recipe, name = run.recipe, f"variants/{comparison.name}/{domain}"

    def action(folder: Path) -> None:
        results: list[Result] = []
        for seed in range(recipe.seed, recipe.seed + comparison.num_seeds):
            for variant, side in comparison.sides(run, domain, seed).items():
                for tokens, loss in _losses(run, domain, side, seed):
                    result = Result(
                        comparison=comparison.name,
                        variant=variant,
                        domain=domain,
                        seed=seed,
                        tokens=tokens,
                        loss=loss,
                    )
                    results.append(result)
                run.report(f"{name}: {variant}: {results[-1]['loss']:.4f}")
        write_json(folder / VARIANTS_FILE, {"results": results})

    laws = recipe.laws
    facts: dict[str, Any] = {
        "adapt": trial_facts(recipe.adapt),
        "tokens": laws.mixture_tokens,
        "examples": laws.variant_examples,
        "keep": laws.selection_keep,
        "seed": recipe.seed,
        "members": recipe.members.model_dump(),
    }
    run.stages.run(name, action, settings=facts, upstream=upstream)
    return name


def _losses(run: Run, domain: str, side: Side, seed: int) -> list[tuple[int, float]]:
    """(training tokens, held-out loss) of one side, from before the training on."""
    member = side.member()
    judge = partial(run.loss, conversations=run.conversations(domain, Split.ROUTER))
    before = judge(member)
    found = trial(
        member,
        side.own,
        run.conversations(GENERAL),
        {"loss": judge},
        general_share=_GENERAL_SHARE,
        after_tokens=run.recipe.laws.mixture_tokens,
        settings=run.recipe.adapt.model_copy(update={"distill": DistillSettings()}),
        seed=seed,
    )
    return [(0, before), *((one.tokens, one.losses["loss"]) for one in found)]
