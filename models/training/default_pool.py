"""Reproduces the pool of small models in `models/pools/default` from the repository alone.

    python -m models.training.default_pool --out DIR [--resume] [--minutes M] [--members a b]

Trains every member from scratch on generated tasks, with checkpoints in `--work`, then writes
checkpoints, measured outcomes and the model card to `--out`. With `--minutes` it stops in time
and goes on with `--resume`. Several processes may train different `--members` at once.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from models.tasks import DOMAINS
from models.training.card import write_card
from models.training.checkpoint import load_weights, read_progress
from models.training.data import Renderer
from models.training.export import export_model
from models.training.outcomes import measure_pool
from models.training.pool_file import write_pool_file
from models.training.shapes import BASE, CHUNK, Shape, build_model, grow, num_parameters
from models.training.tokenizer import build_tokenizer
from models.training.train import Recipe, train

_OTHER_DOMAIN_SHARE: Final = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One model of the pool and how it is trained.

    With a `seedling` recipe, a model of half the depth is trained by it first and then grown.
    """

    name: str
    shape: Shape
    recipe: Recipe
    seedling: Recipe | None = None

    def stages(self) -> tuple[tuple[str, Shape, Recipe], ...]:
        """Checkpoint folder, shape and recipe of each stage, in order."""
        last = (self.name, self.shape, self.recipe)
        if self.seedling is None:
            return (last,)
        half = replace(self.shape, num_layers=self.shape.num_layers // 2)
        return ((f"{self.name}-seedling", half, self.seedling), last)


def _chunk_mixture(own: str) -> dict[str, float]:
    """Mainly the own domain, with a general share of every other."""
    others = {name: _OTHER_DOMAIN_SHARE for name in DOMAINS if name != own}
    return {own: 1 - sum(others.values()), **others}


def _chunk(name: str, *, seed: int, num_steps: int, num_decay_steps: int) -> Member:
    recipe = Recipe(
        mixture=_chunk_mixture(name),
        num_steps=num_steps,
        num_decay_steps=num_decay_steps,
        seed=seed,
    )
    return Member(name=name, shape=CHUNK, recipe=recipe)


def _base_recipe(*, seed: int, num_steps: int, num_decay_steps: int) -> Recipe:
    """All domains alike; short rows, since attention over longer ones costs the base more."""
    return Recipe(
        mixture={name: 1 / len(DOMAINS) for name in DOMAINS},
        num_steps=num_steps,
        num_decay_steps=num_decay_steps,
        rows_per_step=64,
        row_tokens=64,
        seed=seed,
    )


MEMBERS: Final = (
    _chunk("arithmetic", seed=1, num_steps=1100, num_decay_steps=200),
    _chunk("conversion", seed=2, num_steps=1200, num_decay_steps=200),
    _chunk("text", seed=3, num_steps=700, num_decay_steps=175),
    _chunk("code", seed=4, num_steps=1400, num_decay_steps=250),
    Member(
        name="base",
        shape=BASE,
        seedling=_base_recipe(seed=6, num_steps=500, num_decay_steps=0),
        recipe=_base_recipe(seed=5, num_steps=320, num_decay_steps=130),
    ),
)


def train_members(
    members: Sequence[Member],
    tokenizer: PreTrainedTokenizerFast,
    *,
    work: Path,
    resume: bool,
    deadline_s: float | None,
) -> bool:
    """Train the members one after another; whether all of them came to their last step."""
    renderer = Renderer(tokenizer)
    for member in members:
        seedling: LlamaForCausalLM | None = None
        for folder, shape, recipe in member.stages():
            model = build_model(shape, tokenizer, seed=recipe.seed)
            if seedling is not None:
                grow(seedling, model)
            progress = train(
                model,
                renderer,
                recipe,
                folder=work / folder,
                resume=resume,
                deadline_s=deadline_s,
                report=partial(_say, folder),
            )
            if progress.step < recipe.num_steps:
                return False
            seedling = model
    return True


def write_pool(
    members: Sequence[Member], tokenizer: PreTrainedTokenizerFast, *, work: Path, out: Path
) -> None:
    """Export every member that has a checkpoint in `work` and measure the pool."""
    models: dict[str, LlamaForCausalLM] = {}
    for member in members:
        stages = [read_progress(work / folder / "last") for folder, _, _ in member.stages()]
        progress = stages[-1]
        if progress is None:
            continue
        spent = [stage for stage in stages if stage is not None]
        progress = replace(
            progress,
            step=sum(stage.step for stage in spent),
            num_tokens=sum(stage.num_tokens for stage in spent),
            wall_clock_s=sum(stage.wall_clock_s for stage in spent),
        )
        model = build_model(member.shape, tokenizer, seed=member.recipe.seed)
        load_weights(work / member.name / "last", model)
        models[member.name] = export_model(model, tokenizer, progress, out / member.name)
    measure_pool(models, tokenizer, out=out, report=partial(_say, "pool"))
    write_card(list(models), out)
    pool_file = out / "pool.yaml"
    if not pool_file.exists():
        write_pool_file({name: num_parameters(m) for name, m in models.items()}, out)


def _say(name: str, line: str) -> None:
    print(time.strftime("%H:%M:%S"), f"{name}: {line}", flush=True)  # noqa: T201 (the command's output)


def _select(names: Sequence[str]) -> list[Member]:
    known: Mapping[str, Member] = {member.name: member for member in MEMBERS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown members {unknown}; known: {', '.join(known)}")
    return [known[name] for name in names]


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    names = [member.name for member in MEMBERS]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--out", type=Path, help="pool folder to write; without it only train")
    parser.add_argument("--work", type=Path, default=Path("build/default_pool"))
    parser.add_argument("--members", nargs="*", default=names, help="train only these")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints")
    parser.add_argument("--minutes", type=float, help="stop training after so many minutes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    tokenizer = build_tokenizer()
    minutes = arguments.minutes
    finished = train_members(
        _select(arguments.members),
        tokenizer,
        work=arguments.work,
        resume=arguments.resume,
        deadline_s=None if minutes is None else time.monotonic() + 60 * minutes,
    )
    if arguments.out is not None and finished:
        write_pool(MEMBERS, tokenizer, work=arguments.work, out=arguments.out)


if __name__ == "__main__":
    main()
