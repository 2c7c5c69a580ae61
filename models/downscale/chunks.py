"""The stages that come before the members' training: what each domain uses, its cut, its examples.

    base → corpora → calibrate → cut → (warm) → select → …

`members` goes on from there. That in brackets runs where the recipe asks for it; adapters need
neither calibrate nor cut. A stage is a function (see `stage`), and what it builds on are the
functions that it calls.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from models.adapter import read_adapter
from models.downscale.adapt import adapt, choose_device, mean_loss
from models.downscale.adapters import adapted_base, has_adapters
from models.downscale.corpora import GENERAL
from models.downscale.cut import (
    Importance,
    activation_importance,
    cut,
    load_importance,
    save_importance,
)
from models.downscale.data import Selection, select, select_at_random
from models.downscale.examples import conversations
from models.downscale.recipe import ALL_DOMAINS
from models.downscale.shape import solve_shape
from models.downscale.stage import Run, read_json, remembered, stage, write_json
from models.downscale.vocabulary import base_model
from models.tasks.base import Split
from models.training.data import Conversation
from models.training.lora import merge_adapter

BASE: Final = "base"
# What a stage leaves in its folder, beside a checkpoint.
_IMPORTANCE, _SELECTION, CUT_FILE = "importance.npz", "selection.json", "cut.json"


@stage("calibrate")
def calibrate(run: Run, folder: Path, domain: str) -> None:
    """Stage: what of the base the domain uses."""
    examples = conversations(run, domain, Split.TRAIN)
    rng = random.Random(f"calibrate/{run.recipe.seed}")
    sample = rng.sample(examples, min(run.recipe.cut.calibration_examples, len(examples)))
    with placed(base_model(run)[0], run.recipe.adapt.device) as base:
        save_importance(activation_importance(base, sample), folder / _IMPORTANCE)


def importance_of(run: Run, domain: str) -> Importance:
    """What domain `domain` uses of the base, by its activations."""
    return load_importance(calibrate(run, domain) / _IMPORTANCE)


@stage("cut")
def cut_out(run: Run, folder: Path, domain: str) -> None:
    """Stage: the chunk as it is cut from the base."""
    base, members = base_model(run)[0], run.recipe.members
    shape = solve_shape(base.config, members.target(base.num_parameters()), members.shape)
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
        return loss_on(run, conversations(run, domain, Split.ROUTER), member)

    with ExitStack() as stack:
        members = [load_model(warm(run, judge)) for judge in judges]
        device = run.recipe.adapt.device
        selection = select(
            [stack.enter_context(placed(member, device)) for member in members],
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


def untrained(run: Run, domain: str) -> PreTrainedModel:
    """What a member is trained from: its cut, or the base with a fresh adapter."""
    return adapted_base(run) if has_adapters(run) else load_model(cut_out(run, domain))


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
def placed(model: PreTrainedModel, device: str) -> Iterator[PreTrainedModel]:
    """Have `model` on a device ("auto": the GPU if there is one) for a while, then on the CPU."""
    model.to(choose_device(device))  # type: ignore[arg-type]
    try:
        yield model
    finally:
        model.to("cpu")  # type: ignore[arg-type]
