"""The stages that make the members: how much general data, their training, what ships.

    … select → (trained-base, teacher, lessons) → (mixture) → adapt → member

Those in brackets run where the recipe asks for them; who teaches is `teachers`' matter.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from models.adapter import read_adapter
from models.card import ModelCard, read_card
from models.downscale.adapt import NUM_JUDGED, adapt, trial
from models.downscale.adapters import copy_adapter, has_adapters, keep_adapter, training_of
from models.downscale.chunks import BASE, load_model, loss_on, save_model, untrained
from models.downscale.corpora import GENERAL
from models.downscale.data import Point, best_share, fit_mixture
from models.downscale.examples import conversations
from models.downscale.recipe import AdaptSettings
from models.downscale.stage import Run, read_json, stage, write_json
from models.downscale.teachers import ADAPT_FILE, method_for, trained_base, training_data
from models.downscale.vocabulary import base_model
from models.errors import DownscaleError
from models.tasks.base import Split
from models.training.checkpoint import export_checkpoint
from policies.errors import LawError

_MIXTURE: Final = "mixture.json"


@stage("mixture")
def mixture(run: Run, folder: Path) -> None:
    """Stage: the short runs, the D-CPT laws fitted on them, and the share of general data to take.

    Raises:
        DownscaleError: the laws cannot be fitted.
    """
    settings = run.recipe.laws
    points = [
        point
        for domain in run.domains[: settings.mixture_domains]
        for share in settings.mixture_shares
        for point in _points(run, domain, share, folder)
    ]
    try:
        domain_law, general_law = fit_mixture(
            points, seed=run.recipe.seed, num_resamples=settings.bootstrap_samples
        )
        share = best_share(
            domain_law.law,
            general_law.law,
            parameters=points[0]["parameters"],
            tokens=run.recipe.adapt.tokens,
            general_weight=settings.general_weight,
        )
    except LawError as error:
        raise DownscaleError(
            f"laws: the mixture law cannot be fitted: {error}; give more mixture_shares or "
            "mixture_tokens, or a number as adapt.general_share"
        ) from None
    found = {"domain": asdict(domain_law), "general": asdict(general_law)}
    write_json(folder / _MIXTURE, {"general_share": share, "points": points, **found})
    run.report(f"mixture: {share:.1%} general data")


def mixture_of(run: Run) -> dict[str, Any] | None:
    """What the stage found; None where the recipe gives the share of general data."""
    if run.recipe.adapt.general_share != "auto":
        return None
    return read_json(mixture(run) / _MIXTURE)


def general_share(run: Run) -> float:
    """The share of general data of every chunk's training."""
    found, given = mixture_of(run), run.recipe.adapt.general_share
    return float(given if found is None else found["general_share"])


def _points(run: Run, domain: str, share: float, folder: Path) -> list[Point]:
    """One short run's judgements; kept, so that an interrupted stage need not repeat them."""
    file = folder / f"{domain}-{share:g}.json"
    member = untrained(run, domain)
    judged = {
        name: conversations(run, name, Split.ROUTER)[:NUM_JUDGED] for name in (domain, GENERAL)
    }
    if file.exists():
        kept: list[Point] = read_json(file)["points"]
        return kept
    found = trial(
        member,
        training_data(run, domain),
        training_data(run, GENERAL),
        {name: partial(loss_on, run, examples) for name, examples in judged.items()},
        general_share=share,
        after_tokens=run.recipe.laws.mixture_tokens,
        settings=_training(run, run.recipe.adapt),
        seed=run.recipe.seed,
    )
    points = [
        Point(
            domain=domain,
            general_share=share,
            parameters=member.num_parameters(),
            tokens=judgement.tokens,
            domain_loss=judgement.losses[domain],
            general_loss=judgement.losses[GENERAL],
        )
        for judgement in found
    ]
    write_json(file, {"points": points})
    last = points[-1]
    run.report(
        f"mixture/{domain}: {share:.0%} general: {last['domain_loss']:.4f} own, "
        f"{last['general_loss']:.4f} general after {last['tokens']:,} tokens"
    )
    return points


@stage("adapt")
def train_chunk(run: Run, folder: Path, domain: str) -> None:
    """Stage: the chunk's training, mixed with general data and, if asked, a teacher's lessons."""
    settings, share = _training(run, run.recipe.adapt_of(domain)), general_share(run)
    member, own = untrained(run, domain), training_data(run, domain)
    result = adapt(
        member,
        own,
        training_data(run, GENERAL),
        general_share=share,
        tokens=settings.tokens,
        settings=settings,
        seed=run.recipe.seed,
        folder=folder / "training",
        method=method_for(run, domain),
        report=lambda line: run.report(f"adapt/{domain}: {line}"),
    )
    if has_adapters(run):
        keep_adapter(run, member, folder, domain)
    else:
        save_model(run, member, folder)
    facts = {**asdict(result), "general_share": share, "examples": len(own)}
    write_json(folder / ADAPT_FILE, facts)


@stage("member")
def member(run: Run, folder: Path, name: str) -> None:
    """Stage: a member, called like its domain, or the base, as the pool ships it; draws of a
    member's posterior lie in folders within."""
    if name != BASE and has_adapters(run):
        trained = train_chunk(run, name)
        copy_adapter(trained, folder)
        for draw, domain in run.recipe.sampled_members.items():
            if domain == name:
                copy_adapter(trained / draw, folder / draw)
        return
    tokens = run.recipe.adapt_tokens.get(BASE)
    if name != BASE:
        model = load_model(train_chunk(run, name))
    elif tokens is not None:
        model = load_model(trained_base(run, tokens))
    else:
        model = copy.deepcopy(base_model(run)[0])
    export_checkpoint(model.to(torch.bfloat16), base_model(run)[1], folder)  # type: ignore[arg-type]


def _training(run: Run, settings: AdaptSettings) -> AdaptSettings:
    return training_of(run, settings) if has_adapters(run) else settings


def base_of(run: Run, name: str) -> Path | None:
    """The checkpoint that a member is an adapter of; None for a whole one."""
    return member(run, BASE) if name != BASE and has_adapters(run) else None


def card_of(run: Run, name: str) -> ModelCard:
    """The card of a member, or of the base, as the pool ships it."""
    base, folder = base_of(run, name), member(run, name)
    return (
        read_card(folder) if base is None else read_card(base).adapted(read_adapter(folder, base))
    )
