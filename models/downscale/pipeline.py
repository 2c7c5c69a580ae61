"""The whole way from a recipe to a pool, stage by stage.

    base → corpora → calibrate → cut → warm → select → lessons → mixture → adapt → conclude

Each stage reads what earlier ones left in their folders and writes into its own. The stages of one
chunk stand in `chunks`; `conclude` makes comparisons, measurements, laws and the pool.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from models.card import read_card
from models.downscale.base import CHECKPOINT, check_base, train_base, trained_parameters
from models.downscale.chunks import (
    calibrate,
    corpora_stages,
    cut_out,
    select_examples,
    taught_stages,
    teach,
    train,
    warm,
)
from models.downscale.conclude import conclude
from models.downscale.corpus import load_corpus, write_corpus
from models.downscale.disk import check_room, needed_bytes
from models.downscale.errors import CorpusError
from models.downscale.mixture import fit_mixture
from models.downscale.recipe import TASKS, CorpusSettings, Recipe
from models.downscale.run import CORPUS_FILE, Run
from models.downscale.stage import Stages, claimed, publish
from models.pool import load_pool
from models.tasks import Split

_PROBE_EXAMPLES: Final = 2_000


def downscale(
    recipe: Recipe, out: Path, *, resume: bool = False, report: Callable[[str], None] = print
) -> Path:
    """Make the pool of `recipe` in the folder `out` and return it.

    Raises:
        DownscaleError: something that the user can put right; nothing half-written is left where
            a pool would be, and with `resume` the run goes on from what was done.
    """
    _check_before_work(recipe, out)
    with claimed(out, resume=resume) as work:
        stages = Stages(work, report=report)
        base = _base(recipe, stages, report)
        run = Run(recipe=recipe, stages=stages, base_folder=base, report=report)
        _corpora(run)
        _check_questions(run)
        for stage in (calibrate, cut_out, warm, select_examples):
            for domain in run.domains:
                stage(run, domain)
        teach(run)
        fit_mixture(
            run, upstream=[*(f"cut/{domain}" for domain in run.domains), *taught_stages(run)]
        )
        for domain in run.domains:
            train(run, domain)
        assembled = conclude(run, corpora=corpora_stages(run), taught=taught_stages(run))
        load_pool(assembled)  # what does not load is not published
        publish(assembled, out)
    return out


def _check_before_work(recipe: Recipe, out: Path) -> None:
    """Everything that can be known to fail is found before anything is written."""
    if recipe.base.checkpoint is not None:
        folder = Path(recipe.base.checkpoint)
        check_base(folder)
        base_parameters = read_card(folder).parameters
    else:
        assert recipe.base.train is not None
        base_parameters = trained_parameters(recipe.base.train)
    corpus_bytes = 0
    for name, settings in recipe.corpora.items():
        for file in _files(settings):
            if not file.is_file():
                raise CorpusError(f"{name}: there is no corpus at {file}")
            corpus_bytes += file.stat().st_size
    needed = needed_bytes(recipe, base_parameters=base_parameters, corpus_bytes=corpus_bytes)
    check_room(out, needed)


def _files(settings: CorpusSettings) -> list[Path]:
    names = [] if settings.corpus.startswith(TASKS) else [settings.corpus]
    names += [settings.held_out] if settings.held_out is not None else []
    return [Path(name) for name in names]


def _base(recipe: Recipe, stages: Stages, report: Callable[[str], None]) -> Path:
    if recipe.base.checkpoint is not None:
        checkpoint = Path(recipe.base.checkpoint)
        stages.run("base", lambda _: None, settings={}, files=check_base(checkpoint))
        return checkpoint
    training = recipe.base.train
    assert training is not None
    tasks = [settings.corpus.removeprefix(TASKS) for settings in recipe.domains.values()]

    def action(folder: Path) -> None:
        train_base(training, tasks, folder, report=report)

    folder = stages.run("base", action, settings={"train": training.model_dump(), "tasks": tasks})
    return folder / CHECKPOINT


def _corpora(run: Run) -> None:
    recipe = run.recipe
    held_out = max(recipe.measure.router_questions, recipe.measure.test_questions)
    for name, settings in recipe.corpora.items():

        def action(folder: Path, name: str = name, settings: CorpusSettings = settings) -> None:
            corpus = load_corpus(name, settings, held_out=held_out, seed=recipe.seed)
            run.render(name, corpus.examples[:_PROBE_EXAMPLES])
            write_corpus(corpus, folder / CORPUS_FILE)

        facts = {"corpus": settings.model_dump(), "held_out": held_out, "seed": recipe.seed}
        run.stages.run(
            f"corpora/{name}", action, settings=facts, files=_files(settings), upstream=["base"]
        )


def _check_questions(run: Run) -> None:
    """Without a question that can be checked nothing can be measured: better known before training.

    Raises:
        CorpusError: no domain has any in one of the held-out splits.
    """
    for split in (Split.ROUTER, Split.TEST):
        if not any(run.corpus(domain).questions(split) for domain in run.domains):
            raise CorpusError(
                f"no domain has a question with an answer in the held-out split {split!s}; give "
                "records with 'question' and 'answer', or a held_out file of them"
            )
