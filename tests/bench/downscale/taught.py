"""Who should teach a chunk: labels alone, or beside them the base that it was cut from, that base
fine-tuned, a teacher of its domain, or MPDistil.

    python -m tests.bench.downscale.taught BASE OUT [--domains NAME ...] [--tokens N]

BASE is the checkpoint that the chunks are cut from; the fine-tuned one is the shipped pool's
`base`, trained on from the same. A domain's teacher is BASE trained on the domain alone, by the
stage of that name. Every student is the same cut and has as many tokens, about one epoch. Loss
(nats per answer token) and greedy accuracy on held-out questions, 95% by bootstrap over questions,
paired with labels alone. What is made is kept in OUT and not made again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from models.downscale.adapt import adapt
from models.downscale.chunks import load_model, save_model, selected, untrained
from models.downscale.corpora import corpus
from models.downscale.data import with_lessons, write_lessons
from models.downscale.examples import render
from models.downscale.pipeline import claimed
from models.downscale.recipe import AdaptSettings, Recipe
from models.downscale.stage import Run, read_json, write_json
from models.downscale.teachers import ADAPT_FILE, meta_distillation, quiz_apart, teacher
from models.downscale.vocabulary import base_model
from models.pool import DEFAULT_POOL
from models.tasks import DOMAINS
from models.tasks.base import Split
from models.training.data import Conversation
from models.training.forward import Scorer
from models.training.loop import Method
from models.training.mp_distil import MPDistil
from models.training.settings import DistillSettings
from policies.plan import Answer
from tests.bench.downscale.one_domain import (
    answer_odds,
    fused_losses,
    interval,
    per_token,
    right,
)

LABELS = "labels"
# The weights and temperature of MPDistil are those of its authors' code.
META = {"weight": 0.5, "temperature": 5.0, "teacher": "domain"}
WAYS: dict[str, dict[str, Any]] = {
    LABELS: {},
    "base": {"weight": 0.5},
    "trained": {"weight": 0.5, "teacher": "trained"},
    "domain": {"weight": 0.5, "teacher": "domain"},
    **{
        f"{loss}-{reward}": META | {"meta": {"loss": loss, "reward": reward}}
        for loss in ("collaborative", "competitive")
        for reward in ("binary", "real")
    },
    "no-curriculum": META | {"meta": {"curriculum_share": 0.0}},
}


def recipe(base: Path, teacher_tokens: int, num_test: int) -> Recipe:
    """The shipped pool's corpora, cuts and training, without general data."""
    return Recipe.model_validate(
        {
            "name": "taught",
            "base": {"checkpoint": str(base.resolve())},
            "domains": {name: {"corpus": f"tasks:{name}", "examples": 60_000} for name in DOMAINS},
            "members": {"parameters": "1/8", "shape": {"hidden_size": 128, "num_layers": 3}},
            "adapt": {
                "tokens": teacher_tokens,
                "general_share": 0.0,
                "rows_per_step": 32,
                "row_tokens": 64,
                "question_weight": 0.2,
                "distill": {"weight": 0.5, "teacher": "domain", "teacher_tokens": teacher_tokens},
            },
            "measure": {"test_questions": num_test},
        }
    )


def master(run: Run, way: DistillSettings, domain: str) -> PreTrainedModel:
    """The model that teaches."""
    if way.teacher == "domain":
        return load_model(teacher(run, domain))
    return load_model(DEFAULT_POOL / "base") if way.teacher == "trained" else base_model(run)[0]


def epoch(run: Run, domain: str, tokens: int) -> list[Conversation]:
    """So many of the domain's examples that they are gone through about once."""
    examples, lengths = selected(run, domain), [len(one.tokens) for one in selected(run, domain)]
    return examples[: int(np.searchsorted(np.cumsum(lengths), tokens)) + 1]


def train(
    run: Run, domain: str, name: str, folder: Path, *, tokens: int, tasks: Sequence[str]
) -> dict[str, Any]:
    """Train the domain's cut in one of the ways; returns what it took. MPDistil's curriculum
    chooses among `tasks`."""
    if (folder / "facts.json").exists():
        return read_json(folder / "facts.json")
    student, way = untrained(run, domain), DistillSettings.model_validate(WAYS[name])
    settings = AdaptSettings.model_validate({**run.recipe.adapt.model_dump(), "distill": way})
    own, seed, chosen = epoch(run, domain, tokens), run.recipe.seed, None
    if way.meta is not None:
        share = way.meta.quiz_share
        quizzes = {
            one: quiz_apart(selected(run, one), share=share, domain=one, seed=seed)[0]
            for one in tasks
        }
        own = quiz_apart(own, share=share, domain=domain, seed=seed)[1]
        teaching = master(run, way, domain)
        make = partial(meta_distillation, student, teaching, domain, quizzes, settings, seed)
    elif way.weight:
        own = taught(master(run, way, domain), domain, own, folder, settings)

    def method(num_steps: int) -> Method:
        nonlocal chosen
        chosen = make(num_steps) if way.meta is not None else None
        return chosen or Method()

    result = adapt(
        student,
        own,
        (),
        general_share=0.0,
        tokens=tokens,
        settings=settings,
        seed=seed,
        folder=folder / "training",
        method=method,
        report=lambda line: print(f"{domain}/{name}: {line}", flush=True),
    )
    save_model(run, student, folder)
    forward = 2 * base_model(run)[0].num_parameters() * result.tokens
    facts: dict[str, Any] = {"tflop": result.flops / 1e12, "cpu_s": round(result.cpu_s, 1)}
    facts["teacher reads, tflop"] = forward / 1e12 if way.weight else 0.0
    if isinstance(chosen, MPDistil):
        facts["chosen"] = {one: chosen.choices.count(one) for one in tasks}
        facts["rewards"] = [round(reward, 4) for reward in chosen.rewards]
    write_json(folder / "facts.json", facts)
    return facts


def taught(
    teaching: PreTrainedModel,
    domain: str,
    own: list[Conversation],
    folder: Path,
    settings: AdaptSettings,
) -> list[Conversation]:
    """The examples with what the teacher says of them."""
    folder.mkdir(parents=True, exist_ok=True)
    scorer = Scorer(teaching, row_tokens=settings.row_tokens)
    write_lessons(teaching, {domain: own}, folder, scorer=scorer)
    return with_lessons({domain: own}, folder)[domain]


def measure(run: Run, domain: str, folders: dict[str, Path], num_test: int) -> dict[str, Any]:
    """Loss and accuracy of each, and what it has more than labels alone."""
    tests = corpus(run, domain).questions(Split.TEST)[:num_test]
    held_out = render(run, tests)
    losses = {
        name: fused_losses([answer_odds(load_model(folder), held_out)])
        for name, folder in folders.items()
    }
    correct = {  # teachers are of another shape, so each is asked by itself
        name: right({name: folder}, [Answer(members=(name,))], tests)[0].astype(float)
        for name, folder in folders.items()
    }

    def mean(of: NDArray[np.float64], drawn: NDArray[np.int64]) -> float:
        return float(of[drawn].mean())

    found = {}
    for name in folders:
        right_Q, loss_Q = correct[name], losses[name]
        more_Q, base_Q = right_Q - correct[LABELS], losses[LABELS]
        found[name] = {
            "nats": round(per_token(loss_Q), 4),
            "nats beside labels": interval(
                lambda drawn, a=loss_Q, b=base_Q: per_token(a[drawn]) - per_token(b[drawn]),  # type: ignore[misc]
                len(tests),
            ),
            "right": round(float(right_Q.mean()), 4),
            "interval": interval(partial(mean, right_Q), len(tests)),
            "right beside labels": [
                round(float(more_Q.mean()), 4),
                *interval(partial(mean, more_Q), len(tests)),
            ],
        }
    return found


def main() -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.downscale.taught")
    parser.add_argument("base", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--domains", choices=sorted(DOMAINS), nargs="+", default=["arithmetic", "dates"]
    )
    parser.add_argument("--tasks", choices=sorted(DOMAINS), nargs="+", default=list(DOMAINS))
    parser.add_argument("--ways", choices=list(WAYS), nargs="+", default=list(WAYS))
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--teacher-tokens", type=int, default=900_000)
    parser.add_argument("--test", type=int, default=800)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ways = [LABELS, *(name for name in arguments.ways if name != LABELS)]
    result: dict[str, Any] = {}
    with claimed(arguments.out, resume=arguments.out.exists()) as work:
        settings = recipe(arguments.base, arguments.teacher_tokens, arguments.test)
        run = Run(settings, work, report=partial(print, flush=True))
        for domain in arguments.domains:
            folders = {name: work / "taught" / domain / name for name in ways}
            facts = {
                name: train(
                    run, domain, name, folder, tokens=arguments.tokens, tasks=arguments.tasks
                )
                for name, folder in folders.items()
            }
            whole = {
                "teacher-base": arguments.base,
                "teacher-trained": DEFAULT_POOL / "base",
                "teacher-domain": teacher(run, domain),
            }
            told = measure(run, domain, {**folders, **whole}, arguments.test)
            training = {**facts, "teacher-domain": read_json(teacher(run, domain) / ADAPT_FILE)}
            result[domain] = {"measured": told, "training": training}
            write_json(arguments.out / "taught.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
