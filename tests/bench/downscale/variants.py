"""Choices within the pipeline, each compared with its alternatives at equal budget.

"selection": the examples that an ensemble is most or least sure of, against as many by lot.
"pruning": parts kept by activation against parts kept by the spectrum of the weights.
"distillation": half of the loss from the base's distributions, against labels alone.
All else is equal, and all sides are trained alike, for a few domains and fewer tokens than the
chunks get.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final, TypedDict

from transformers import PreTrainedModel

from models.downscale.adapt import adapt, trial
from models.downscale.chunks import cut_out, importance_of, load_model, loss_on
from models.downscale.corpora import GENERAL
from models.downscale.cut import cut
from models.downscale.data import (
    keep_by,
    select_at_random,
    uncertainty,
    with_lessons,
    write_lessons,
)
from models.downscale.examples import conversations
from models.downscale.shape import shape_of
from models.downscale.stage import Run, read_json, stage, write_json
from models.downscale.vocabulary import base_model
from models.precision import products_dtype
from models.tasks.base import Split
from models.training.data import Conversation
from models.training.forward import Scorer
from models.training.settings import DistillSettings
from tests.bench.downscale.spectrum import spectrum_importance

VARIANTS_FILE: Final = "variants.json"
_GENERAL_SHARE: Final = 0.1
_ENSEMBLE: Final = 2
_NUM_CANDIDATES: Final = 12_000
_KEEP: Final = 0.6


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
    """What is compared: the sides for a domain and a seed, how many seeds, and the name by which
    `--baselines` asks for it."""

    baseline: str
    sides: Callable[[Run, str, int], dict[str, Side]]
    num_seeds: int


@stage("variants")
def variants(run: Run, folder: Path, name: str, domain: str) -> None:
    """Stage: one comparison on one domain."""
    comparison = COMPARISONS[name]
    results: list[Result] = []
    for seed in range(run.recipe.seed, run.recipe.seed + comparison.num_seeds):
        for variant, side in comparison.sides(run, domain, seed).items():
            for tokens, loss in _losses(run, domain, side, seed):
                result = Result(
                    comparison=name,
                    variant=variant,
                    domain=domain,
                    seed=seed,
                    tokens=tokens,
                    loss=loss,
                )
                results.append(result)
            run.report(f"variants/{name}/{domain}: {variant}: {results[-1]['loss']:.4f}")
    write_json(folder / VARIANTS_FILE, {"results": results})


def results_of(run: Run, baselines: Sequence[str]) -> list[Result]:
    """What the comparisons of those names found on the recipe's first domains."""
    wanted = [name for name, one in COMPARISONS.items() if one.baseline in baselines]
    return [
        result
        for name in wanted
        for domain in run.domains[: run.recipe.laws.mixture_domains]
        for result in read_json(variants(run, name, domain) / VARIANTS_FILE)["results"]
    ]


def _candidates(run: Run, domain: str) -> list[Conversation]:
    return conversations(run, domain, Split.TRAIN)[:_NUM_CANDIDATES]


def _selections(run: Run, domain: str, seed: int) -> dict[str, Side]:
    """BALD with an ensemble of the domain's own chunk, trained shortly in different orders."""
    candidates, settings = _candidates(run, domain), run.recipe.laws
    members = []
    for number in range(_ENSEMBLE):
        member = load_model(cut_out(run, domain))
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
    kept = {
        "most uncertain": keep_by(scores, _KEEP, "hard"),
        "most certain": keep_by(scores, _KEEP, "easy"),
        "by lot": select_at_random(len(candidates), keep=_KEEP, seed=seed).kept,
    }
    fresh = partial(load_model, cut_out(run, domain))
    return {
        name: Side(member=fresh, own=[candidates[i] for i in indices])
        for name, indices in kept.items()
    }


def _prunings(run: Run, domain: str, seed: int) -> dict[str, Side]:
    shape = shape_of(load_model(cut_out(run, domain)).config)
    scores = {
        "activation": importance_of(run, domain),
        "spectrum": spectrum_importance(base_model(run)[0]),
    }
    return {
        name: Side(
            member=lambda score=score: cut(base_model(run)[0], score, shape)[0],  # type: ignore[misc]
            own=_candidates(run, domain),
        )
        for name, score in scores.items()
    }


def _distillations(run: Run, domain: str, seed: int) -> dict[str, Side]:
    candidates, settings = _candidates(run, domain), run.recipe.adapt
    base = base_model(run)[0]
    scorer = Scorer(
        base,
        row_tokens=settings.row_tokens,
        compiled=settings.compiled,
        dtype=products_dtype(settings.precision, base.device),
    )
    with TemporaryDirectory() as folder:
        write_lessons(base, {domain: candidates}, Path(folder), scorer=scorer)
        taught = with_lessons({domain: candidates}, Path(folder))[domain]
    fresh = partial(load_model, cut_out(run, domain))
    return {
        "labels and base": Side(member=fresh, own=taught),
        "labels alone": Side(member=fresh, own=candidates),
    }


def _losses(run: Run, domain: str, side: Side, seed: int) -> list[tuple[int, float]]:
    """(training tokens, held-out loss) of one side, from before the training on."""
    member = side.member()
    judge = partial(loss_on, run, conversations(run, domain, Split.ROUTER))
    before = judge(member)
    found = trial(
        member,
        side.own,
        conversations(run, GENERAL, Split.TRAIN),
        {"loss": judge},
        general_share=_GENERAL_SHARE,
        after_tokens=run.recipe.laws.mixture_tokens,
        settings=run.recipe.adapt.model_copy(update={"distill": DistillSettings(weight=0.5)}),
        seed=seed,
    )
    return [(0, before), *((one.tokens, one.losses["loss"]) for one in found)]


COMPARISONS = {
    "selection": Comparison(baseline="random", sides=_selections, num_seeds=2),
    "pruning": Comparison(baseline="spectrum", sides=_prunings, num_seeds=1),
    "distillation": Comparison(baseline="distilled", sides=_distillations, num_seeds=1),
}
