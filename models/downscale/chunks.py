"""The stages that make the pool's members: what each domain uses, its cut, its data, its training.

    base → corpora → calibrate → cut → (warm) → select → (lessons) → (mixture) → adapt → member

Those in brackets run where the recipe asks for them; adapters need neither calibrate nor cut. A
stage is a function (see `stage`), and what it builds on are the functions that it calls.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from models.adapter import read_adapter
from models.card import ModelCard, read_card
from models.downscale.adapt import NUM_JUDGED, adapt, choose_device, mean_loss, trial
from models.downscale.adapters import (
    adapted_base,
    copy_adapter,
    has_adapters,
    keep_adapter,
    method_of,
    training_of,
)
from models.downscale.base import base_model
from models.downscale.cut import (
    Importance,
    activation_importance,
    cut,
    load_importance,
    save_importance,
)
from models.downscale.data import (
    Point,
    Selection,
    best_share,
    fit_mixture,
    select,
    select_at_random,
    with_lessons,
    write_lessons,
)
from models.downscale.examples import GENERAL, conversations
from models.downscale.recipe import ALL_DOMAINS, AdaptSettings
from models.downscale.shape import num_parameters, solve_shape
from models.downscale.stage import Run, progress_bar, read_json, remembered, stage, write_json
from models.errors import DownscaleError
from models.precision import products_dtype
from models.tasks.base import Split
from models.training.checkpoint import export_checkpoint
from models.training.data import Conversation
from models.training.forward import Scorer
from models.training.lora import merge_adapter
from policies.errors import LawError

BASE: Final = "base"
# What a stage leaves in its folder, beside a checkpoint.
_IMPORTANCE, _SELECTION, _MIXTURE = "importance.npz", "selection.json", "mixture.json"
CUT_FILE, ADAPT_FILE = "cut.json", "adapt.json"


@stage("calibrate")
def calibrate(run: Run, folder: Path, domain: str) -> None:
    """Stage: what of the base the domain uses."""
    examples = conversations(run, domain, Split.TRAIN)
    rng = random.Random(f"calibrate/{run.recipe.seed}")
    sample = rng.sample(examples, min(run.recipe.cut.calibration_examples, len(examples)))
    with _placed(base_model(run)[0], run.recipe.adapt.device) as base:
        save_importance(activation_importance(base, sample), folder / _IMPORTANCE)


def importance_of(run: Run, domain: str) -> Importance:
    """What domain `domain` uses of the base, by its activations."""
    return load_importance(calibrate(run, domain) / _IMPORTANCE)


@stage("cut")
def cut_out(run: Run, folder: Path, domain: str) -> None:
    """Stage: the chunk as it is cut from the base."""
    base, members = base_model(run)[0], run.recipe.members
    shape = solve_shape(base.config, members.target(num_parameters(base)), members.shape)
    chunk, report = cut(base, importance_of(run, domain), shape)
    save_model(run, chunk, folder)
    write_json(folder / CUT_FILE, {**asdict(report), "pruned_share": report.pruned_share})
    run.report(
        f"cut/{domain}: {report.parameters:,} of {report.base_parameters:,} parameters: "
        f"{shape.num_layers} layers of {shape.hidden_size} channels, {shape.num_heads} heads "
        f"in {shape.num_kv_heads} groups, feed-forward {shape.intermediate_size}"
    )


@stage("warm")
def warm(run: Run, folder: Path, domain: str) -> None:
    """Stage: the cut chunk a little trained on general data, to judge examples."""
    member = load_model(cut_out(run, domain))
    tokens = run.recipe.select.warmup_tokens
    _short_run(run, member, conversations(run, GENERAL, Split.TRAIN), tokens)
    save_model(run, member, folder)


@stage("select")
def select_examples(run: Run, folder: Path, domain: str) -> None:
    """Stage: which of the domain's examples are trained on."""
    examples, settings = conversations(run, domain, Split.TRAIN), run.recipe.select
    if settings.by == "random" or settings.keep == 1:
        seed = run.recipe.seed
        selection = select_at_random(len(examples), keep=settings.keep, seed=seed)
    else:
        selection = _by_uncertainty(run, domain, examples)
    write_json(folder / _SELECTION, {**asdict(selection), "of": len(examples)})


def selection_of(run: Run, domain: str) -> dict[str, Any]:
    """What the stage chose and why, and `of` how many."""
    return read_json(select_examples(run, domain) / _SELECTION)


def _by_uncertainty(run: Run, domain: str, examples: Sequence[Conversation]) -> Selection:
    settings, at = run.recipe.select, run.domains.index(domain)
    # The domain's own chunk judges, and those that come after it.
    judges = [*run.domains[at:], *run.domains[:at]][: settings.ensemble]
    assert settings.by != "random"

    def try_out(kept: Sequence[int]) -> float:
        member = load_model(warm(run, domain))
        _short_run(run, member, [examples[i] for i in kept], settings.trial_tokens)
        return held_out_loss(run, member, domain)

    with ExitStack() as stack:
        members = [load_model(warm(run, judge)) for judge in judges]
        device = run.recipe.adapt.device
        selection = select(
            [stack.enter_context(_placed(member, device)) for member in members],
            examples,
            keep=settings.keep,
            by=settings.by,
            switch=settings.switch,
            trial=try_out,
        )
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in selection.trials.items())
    run.report(
        f"select/{domain}: the {selection.switch} {len(selection.kept):,} of "
        f"{len(examples):,} examples" + (f" (trials: {losses})" if losses else "")
    )
    return selection


def _short_run(
    run: Run, member: PreTrainedModel, examples: Sequence[Conversation], tokens: int
) -> None:
    """Train `member` in place for `tokens`, on its own corpus alone and without the base."""
    adapt(
        member,
        examples,
        (),
        general_share=0.0,
        tokens=tokens,
        settings=run.recipe.adapt,
        seed=run.recipe.seed,
        distill=False,
    )


@remembered
def selected(run: Run, name: str) -> list[Conversation]:
    """The training conversations of a domain that the selection kept; for the general corpus of
    all domains, those of each in turn; for a general corpus of its own, all of them."""
    if name != GENERAL:
        examples = conversations(run, name, Split.TRAIN)
        return [examples[i] for i in selection_of(run, name)["kept"]]
    if run.recipe.general.corpus != ALL_DOMAINS:
        return conversations(run, GENERAL, Split.TRAIN)
    parts = [selected(run, domain) for domain in run.domains]
    return [one for together in zip(*parts, strict=False) for one in together]


@stage("lessons")
def lessons(run: Run, folder: Path) -> None:
    """Stage: what the base says of every selected example, once for all chunks."""
    examples = {name: selected(run, name) for name in (*run.domains, GENERAL)}
    total = len({tuple(one.tokens) for some in examples.values() for one in some})
    settings = run.recipe.adapt
    with (
        _placed(base_model(run)[0], settings.device) as base,
        progress_bar(total, "lessons", unit="examples") as advance,
    ):
        scorer = Scorer(
            base,
            row_tokens=settings.row_tokens,
            compiled=settings.compiled,
            dtype=products_dtype(settings.precision, base.device),
        )
        tokens = write_lessons(base, examples, folder, scorer=scorer, progress=advance)
    run.report(f"lessons: the base read {tokens:,} tokens")


@remembered
def training_data(run: Run) -> dict[str, list[Conversation]]:
    """`selected` by domain, and "general", with what the base says of them where it teaches."""
    examples = {name: selected(run, name) for name in (*run.domains, GENERAL)}
    if run.recipe.adapt.distill.weight == 0:
        return examples
    return with_lessons(examples, lessons(run))


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
    data, member = training_data(run), untrained(run, domain)
    judged = {
        name: conversations(run, name, Split.ROUTER)[:NUM_JUDGED] for name in (domain, GENERAL)
    }
    if file.exists():
        kept: list[Point] = read_json(file)["points"]
        return kept
    found = trial(
        member,
        data[domain],
        data[GENERAL],
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
            parameters=num_parameters(member),
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
    """Stage: the chunk's training, mixed with general data and, if asked, the base's lessons."""
    settings, share = _training(run, run.recipe.adapt_of(domain)), general_share(run)
    member, data = untrained(run, domain), training_data(run)
    result = adapt(
        member,
        data[domain],
        data[GENERAL],
        general_share=share,
        tokens=settings.tokens,
        settings=settings,
        seed=run.recipe.seed,
        folder=folder / "training",
        method=method_of(run),
        report=lambda line: run.report(f"adapt/{domain}: {line}"),
    )
    if has_adapters(run):
        keep_adapter(run, member, folder, domain)
    else:
        save_model(run, member, folder)
    facts = {**asdict(result), "general_share": share, "examples": len(data[domain])}
    write_json(folder / ADAPT_FILE, facts)


@stage("trained-base")
def trained_base(run: Run, folder: Path, tokens: int) -> None:
    """Stage: the base that the chunks were cut from, trained on all corpora for `tokens`."""
    settings, model = run.recipe.adapt_of_base(tokens), copy.deepcopy(base_model(run)[0])
    result = adapt(
        model,
        [one for domain in run.domains for one in conversations(run, domain, Split.TRAIN)],
        (),
        general_share=0.0,
        tokens=tokens,
        settings=settings,
        seed=run.recipe.seed,
        folder=folder / "training",
        report=lambda line: run.report(f"trained base: {line}"),
    )
    save_model(run, model, folder)
    write_json(folder / ADAPT_FILE, asdict(result))


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


def untrained(run: Run, domain: str) -> PreTrainedModel:
    """What a member is trained from: its cut, or the base with a fresh adapter."""
    return adapted_base(run) if has_adapters(run) else load_model(cut_out(run, domain))


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


def held_out_loss(
    run: Run, model: PreTrainedModel, name: str, split: Split = Split.ROUTER
) -> float:
    """Nats per answer token of `model` on the held-out examples of a domain."""
    return loss_on(run, conversations(run, name, split), model)


def loss_on(run: Run, examples: Sequence[Conversation], model: PreTrainedModel) -> float:
    """Nats per answer token of `model` on these conversations."""
    return mean_loss(model, examples, row_tokens=run.recipe.adapt.row_tokens)


def save_model(run: Run, model: PreTrainedModel, folder: Path) -> None:
    """Write a checkpoint that transformers loads, with its tokenizer."""
    model.save_pretrained(folder)
    base_model(run)[1].save_pretrained(folder)


def load_model(folder: Path, *, base: Path | None = None) -> PreTrainedModel:
    """Load a checkpoint in fp32, or an adapter merged into its `base`."""
    model = AutoModelForCausalLM.from_pretrained(base or folder, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    if base is not None:
        merge_adapter(model, read_adapter(folder, base))
    model.eval()  # type: ignore[no-untyped-call]
    return model


@contextmanager
def _placed(model: PreTrainedModel, device: str) -> Iterator[PreTrainedModel]:
    """Have `model` on a device ("auto": the GPU if there is one) for a while, then on the CPU."""
    model.to(choose_device(device))  # type: ignore[arg-type]
    try:
        yield model
    finally:
        model.to("cpu")  # type: ignore[arg-type]
