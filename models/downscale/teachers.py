"""Who teaches the members beside their labels: the base, that base trained on, or one per domain.

A teacher reads every example once and leaves its likeliest tokens there (`lessons`), so that it
need not run beside the members; only MPDistil's does, since its head goes on learning. Data that a
domain's teacher was not trained on, the general ones, are learnt by their labels alone.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from transformers import PreTrainedModel

from models.downscale.adapt import adapt, choose_device
from models.downscale.adapters import method_of
from models.downscale.chunks import BASE, load_model, placed, save_model, selected, untrained
from models.downscale.corpora import GENERAL
from models.downscale.data import with_lessons, write_lessons
from models.downscale.examples import conversations
from models.downscale.recipe import AdaptSettings
from models.downscale.stage import Run, progress_bar, read_json, remembered, stage, write_json
from models.downscale.vocabulary import base_model
from models.precision import products_dtype
from models.tasks.base import Split
from models.training.data import Conversation
from models.training.forward import Scorer
from models.training.loop import Method
from models.training.mp_distil import MPDistil, Running
from models.training.settings import DistillSettings

ADAPT_FILE: Final = "adapt.json"
LABELS_ALONE: Final = "nothing, labels alone"
_WHO: Final = {
    "base": "the base",
    "trained": "the base, trained on all corpora",
    "domain": "the base, trained on its domain",
}


@stage("trained-base")
def trained_base(run: Run, folder: Path, tokens: int) -> None:
    """Stage: the base that the chunks were cut from, trained on all corpora for `tokens`."""
    examples = [one for domain in run.domains for one in conversations(run, domain, Split.TRAIN)]
    _train_whole(run, folder, examples, run.recipe.adapt_of_base(tokens), "trained base")


@stage("teacher")
def teacher(run: Run, folder: Path, domain: str) -> None:
    """Stage: the base, whole, trained on the domain alone, to teach its member.

    Unless the recipe says for how many tokens, it takes as much compute as its member.
    """
    tokens = run.recipe.adapt.distill.teacher_tokens
    if tokens is None:
        share = untrained(run, domain).num_parameters() / base_model(run)[0].num_parameters()
        tokens = max(1, round(share * run.recipe.adapt_of(domain).tokens))
    settings = run.recipe.adapt_of_teacher(tokens)
    _train_whole(run, folder, selected(run, domain), settings, f"teacher/{domain}")


def _train_whole(
    run: Run,
    folder: Path,
    examples: Sequence[Conversation],
    settings: AdaptSettings,
    who: str,
) -> None:
    """Train a copy of the base on `examples` and nothing else, and leave it in `folder`."""
    model = copy.deepcopy(base_model(run)[0])
    result = adapt(
        model,
        examples,
        (),
        general_share=0.0,
        tokens=settings.tokens,
        settings=settings,
        seed=run.recipe.seed,
        folder=folder / "training",
        report=lambda line: run.report(f"{who}: {line}"),
    )
    save_model(run, model, folder)
    write_json(folder / ADAPT_FILE, asdict(result))


def teachers_training(run: Run, domain: str) -> dict[str, Any] | None:
    """What the training of a domain's own teacher took; None where it has none."""
    if run.recipe.adapt.distill.teacher != "domain":
        return None
    return read_json(teacher(run, domain) / ADAPT_FILE)


def taught_by(run: Run) -> str:
    """Who teaches the members beside their labels, for people to read."""
    distill = run.recipe.adapt.distill
    if distill.weight == 0:
        return LABELS_ALONE
    return _WHO[distill.teacher] + (", by MPDistil" if distill.meta is not None else "")


def teacher_of(run: Run, name: str) -> PreTrainedModel:
    """Who teaches the examples of `name`: a domain, or "general" for all where one teaches all."""
    chosen = run.recipe.adapt.distill.teacher
    if chosen == "domain":
        return load_model(teacher(run, name))
    if chosen == "base":
        return copy.deepcopy(base_model(run)[0])
    return load_model(trained_base(run, run.recipe.adapt_tokens[BASE]))


@stage("lessons")
def lessons(run: Run, folder: Path, name: str) -> None:
    """Stage: what a teacher says of every selected example, once: a domain's own of the domain's,
    the one of all ("general") of all."""
    examples = _scope(run, name)
    total = len({tuple(one.tokens) for some in examples.values() for one in some})
    settings = run.recipe.adapt
    with (
        placed(teacher_of(run, name), settings.device) as model,
        progress_bar(total, f"lessons/{name}", unit="examples") as advance,
    ):
        scorer = Scorer(
            model,
            row_tokens=settings.row_tokens,
            compiled=settings.compiled,
            dtype=products_dtype(settings.precision, model.device),
        )
        tokens = write_lessons(model, examples, folder, scorer=scorer, progress=advance)
    run.report(f"lessons/{name}: the teacher read {tokens:,} tokens")


@remembered
def _taught(run: Run, name: str) -> dict[str, list[Conversation]]:
    """The examples that `lessons` of this name are of, with the lessons."""
    return with_lessons(_scope(run, name), lessons(run, name))


def _scope(run: Run, name: str) -> dict[str, list[Conversation]]:
    names = (*run.domains, GENERAL) if name == GENERAL else (name,)
    return {one: selected(run, one) for one in names}


def training_data(run: Run, name: str) -> list[Conversation]:
    """What is trained on of a domain, or of "general": `selected`, with what a teacher says of it
    where one does. What MPDistil holds back for its quizzes is not among it."""
    distill = run.recipe.adapt.distill
    if distill.weight == 0:
        return selected(run, name)
    if distill.meta is not None:
        return selected(run, name) if name == GENERAL else _quiz_apart(run, name)[1]
    if distill.teacher != "domain":
        return _taught(run, GENERAL)[name]
    return selected(run, GENERAL) if name == GENERAL else _taught(run, name)[name]


@remembered
def _quiz_apart(run: Run, domain: str) -> tuple[list[Conversation], list[Conversation]]:
    meta, seed = run.recipe.adapt.distill.meta, run.recipe.seed
    assert meta is not None
    return quiz_apart(selected(run, domain), share=meta.quiz_share, domain=domain, seed=seed)


def quiz_apart(
    examples: Sequence[Conversation], *, share: float, domain: str, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """A domain's quiz, this share of its examples by lot, and the rest."""
    mixed = list(examples)
    random.Random(f"quiz/{domain}/{seed}").shuffle(mixed)
    count = max(1, round(share * len(mixed)))
    return mixed[:count], mixed[count:]


def method_for(run: Run, domain: str) -> Callable[[int], Method]:
    """What takes part in the steps of a member's training, by their number."""
    distill = run.recipe.adapt.distill
    if distill.meta is None:
        return method_of(run)
    return partial(
        meta_distillation,
        untrained(run, domain),
        teacher_of(run, domain),
        domain,
        {name: _quiz_apart(run, name)[0] for name in run.domains},
        run.recipe.adapt_of(domain),
        run.recipe.seed,
    )


def meta_distillation(
    student: PreTrainedModel,
    master: PreTrainedModel,
    own: str,
    quizzes: dict[str, list[Conversation]],
    settings: AdaptSettings,
    seed: int,
    num_steps: int,
) -> MPDistil:
    """MPDistil of `student`, whose domain is `own`, as the settings want it."""
    device = choose_device(settings.device)
    return MPDistil(
        student,
        master,
        own,
        quizzes,
        settings=DistillSettings(**settings.distill.model_dump()),
        running=Running(
            num_steps=num_steps,
            rows_per_step=settings.rows_per_step,
            row_tokens=settings.row_tokens,
            device=device,
            dtype=products_dtype(settings.precision, torch.device(device)),
            compiled=settings.compiled,
            seed=seed,
        ),
    )
