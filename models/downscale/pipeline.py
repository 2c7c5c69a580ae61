"""The whole way from a recipe to a pool, stage by stage.

    base → corpora → calibrate → cut → lessons → warm → select → mixture → adapt → …

Each stage reads what earlier ones left in their folders and writes into its own; which inputs each
depends on stands here, and nowhere else.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch
from transformers import PreTrainedModel

from models.card import read_card
from models.downscale.adapt import adapt
from models.downscale.architecture import num_parameters
from models.downscale.base import CHECKPOINT, check_base, train_base, trained_parameters
from models.downscale.calibrate import activation_importance
from models.downscale.corpus import load_corpus, write_corpus
from models.downscale.cut import cut
from models.downscale.disk import check_room, needed_bytes
from models.downscale.errors import CorpusError
from models.downscale.importance import save_importance
from models.downscale.mixture import fit_mixture, general_share
from models.downscale.progress import progress_bar
from models.downscale.recipe import ALL_DOMAINS, TASKS, CorpusSettings, Recipe
from models.downscale.run import (
    ADAPT_FILE,
    CORPUS_FILE,
    CUT_FILE,
    GENERAL,
    IMPORTANCE_FILE,
    SELECTION_FILE,
    Run,
    save_chunk,
)
from models.downscale.select import Selection, select, select_at_random
from models.downscale.shapes import solve_shape
from models.downscale.spectrum import spectrum_importance
from models.downscale.stage import Stages, claimed, write_json
from models.downscale.teacher import write_lessons
from models.training.data import Conversation
from models.training.score import Scorer

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
        for stage in (_calibrate, _cut, _warm, _select):
            for domain in run.domains:
                stage(run, domain)
        _lessons(run)
        fit_mixture(run, upstream=[*(f"cut/{domain}" for domain in run.domains), *_taught(run)])
        for domain in run.domains:
            _adapt(run, domain)
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
    for name, settings in _sources(recipe).items():
        for file in _files(settings):
            if not file.is_file():
                raise CorpusError(f"{name}: there is no corpus at {file}")
            corpus_bytes += file.stat().st_size
    needed = needed_bytes(recipe, base_parameters=base_parameters, corpus_bytes=corpus_bytes)
    check_room(out, needed)


def _sources(recipe: Recipe) -> dict[str, CorpusSettings]:
    """The corpora that are read or generated, by name."""
    general = {} if recipe.general.corpus == ALL_DOMAINS else {GENERAL: recipe.general}
    return {**recipe.domains, **general}


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
    for name, settings in _sources(recipe).items():

        def action(folder: Path, name: str = name, settings: CorpusSettings = settings) -> None:
            corpus = load_corpus(name, settings, held_out=held_out, seed=recipe.seed)
            run.render(name, corpus.examples[:_PROBE_EXAMPLES])
            write_corpus(corpus, folder / CORPUS_FILE)

        facts = {"corpus": settings.model_dump(), "held_out": held_out, "seed": recipe.seed}
        run.stages.run(
            f"corpora/{name}", action, settings=facts, files=_files(settings), upstream=["base"]
        )


def _calibrate(run: Run, domain: str) -> None:
    settings = run.recipe.cut

    def action(folder: Path) -> None:
        examples = run.conversations(domain)
        rng = random.Random(f"calibrate/{run.recipe.seed}")
        sample = rng.sample(examples, min(settings.calibration_examples, len(examples)))
        save_importance(activation_importance(run.base, sample), folder / IMPORTANCE_FILE)

    facts = {
        "examples": settings.calibration_examples,
        "row_tokens": run.recipe.adapt.row_tokens,
        "seed": run.recipe.seed,
    }
    upstream = ["base", f"corpora/{domain}"]
    run.stages.run(f"calibrate/{domain}", action, settings=facts, upstream=upstream)


def _cut(run: Run, domain: str) -> None:
    recipe = run.recipe

    def action(folder: Path) -> None:
        base = run.base
        target = recipe.members.target(num_parameters(base))
        shape = solve_shape(base.config, target, recipe.members.shape)
        by_activation = recipe.cut.importance == "activation"
        importance = run.importance(domain) if by_activation else spectrum_importance(base)
        chunk, report = cut(base, importance, shape)
        save_chunk(chunk, run.tokenizer, folder)
        write_json(folder / CUT_FILE, {**asdict(report), "pruned_share": report.pruned_share})
        run.report(
            f"cut/{domain}: {report.parameters:,} of {report.base_parameters:,} parameters: "
            f"{shape.num_layers} layers of {shape.hidden_size} channels, {shape.num_heads} heads "
            f"in {shape.num_kv_heads} groups, feed-forward {shape.intermediate_size}"
        )

    facts = {"members": recipe.members.model_dump(), "importance": recipe.cut.importance}
    run.stages.run(f"cut/{domain}", action, settings=facts, upstream=[f"calibrate/{domain}"])


def _warm(run: Run, domain: str) -> None:
    """Train the cut member a little on the general corpus, to judge the others' examples."""
    recipe = run.recipe
    if recipe.select.by == "random" or recipe.select.keep == 1:
        return

    def action(folder: Path) -> None:
        member = run.chunk(domain, stage="cut")
        _short_run(run, member, run.conversations(GENERAL), recipe.select.warmup_tokens)
        save_chunk(member, run.tokenizer, folder)

    facts = {
        "adapt": recipe.adapt.model_dump(),
        "tokens": recipe.select.warmup_tokens,
        "seed": recipe.seed,
    }
    upstream = [f"cut/{domain}", *_corpora_stages(run)]
    run.stages.run(f"warm/{domain}", action, settings=facts, upstream=upstream)


def _select(run: Run, domain: str) -> None:
    recipe, settings = run.recipe, run.recipe.select
    ensemble = _ensemble(run, domain)

    def action(folder: Path) -> None:
        write_json(folder / SELECTION_FILE, asdict(_selection(run, domain, ensemble)))

    facts = {
        "select": settings.model_dump(),
        "adapt": recipe.adapt.model_dump() if settings.by != "random" else None,
        "row_tokens": recipe.adapt.row_tokens,
        "seed": recipe.seed,
    }
    upstream = [f"corpora/{domain}", *(f"warm/{member}" for member in ensemble)]
    run.stages.run(f"select/{domain}", action, settings=facts, upstream=upstream)


def _ensemble(run: Run, domain: str) -> list[str]:
    """The members that judge the corpus of `domain`: its own, and those that come after it."""
    settings = run.recipe.select
    if settings.by == "random" or settings.keep == 1:
        return []
    at = run.domains.index(domain)
    return [*run.domains[at:], *run.domains[:at]][: settings.ensemble]


def _selection(run: Run, domain: str, ensemble: Sequence[str]) -> Selection:
    settings = run.recipe.select
    conversations = run.conversations(domain)
    if settings.by == "random" or settings.keep == 1:
        return select_at_random(len(conversations), keep=settings.keep, seed=run.recipe.seed)

    def trial(kept: Sequence[int]) -> float:
        member = run.chunk(domain, stage="warm")
        _short_run(run, member, [conversations[i] for i in kept], settings.trial_tokens)
        return run.held_out_loss(member, domain)

    selection = select(
        [run.chunk(member, stage="warm") for member in ensemble],
        conversations,
        keep=settings.keep,
        by=settings.by,
        switch=settings.switch,
        trial=trial,
    )
    losses = ", ".join(f"{name} {loss:.4f}" for name, loss in selection.trials.items())
    run.report(
        f"select/{domain}: the {selection.switch} {len(selection.kept):,} of "
        f"{len(conversations):,} examples" + (f" (trials: {losses})" if losses else "")
    )
    return selection


def _short_run(
    run: Run, member: PreTrainedModel, conversations: Sequence[Conversation], tokens: int
) -> None:
    """Train `member` in place for `tokens`, on its own corpus alone and without the base."""
    adapt(
        member,
        conversations,
        (),
        general_share=0.0,
        tokens=tokens,
        settings=run.recipe.adapt,
        seed=run.recipe.seed,
        distill=False,
    )


def _lessons(run: Run) -> None:
    """What the base says of every selected example, computed once for all members."""
    if run.recipe.adapt.distill.weight == 0:
        return
    settings = run.recipe.adapt

    def action(folder: Path) -> None:
        corpora = {name: run.selected(name) for name in (*run.domains, GENERAL)}
        base = run.base
        scorer = Scorer(
            base,
            row_tokens=settings.row_tokens,
            compiled=settings.compiled,
            dtype=torch.bfloat16 if settings.precision == "bfloat16" else torch.float32,
        )
        total = len({tuple(one.tokens) for corpus in corpora.values() for one in corpus})
        with progress_bar(total, "lessons", unit="examples") as advance:
            tokens = write_lessons(base, corpora, folder, scorer=scorer, progress=advance)
        run.report(f"lessons: the base read {tokens:,} tokens")

    facts = {"row_tokens": settings.row_tokens, "precision": settings.precision}
    upstream = ["base", *_corpora_stages(run), *(f"select/{domain}" for domain in run.domains)]
    run.stages.run("lessons", action, settings=facts, upstream=upstream)


def _taught(run: Run) -> list[str]:
    """The stages whose results training reads: which examples, and what the base says of them."""
    selected = [f"select/{domain}" for domain in run.domains]
    lessons = [] if run.recipe.adapt.distill.weight == 0 else ["lessons"]
    return [*_corpora_stages(run), *selected, *lessons]


def _adapt(run: Run, domain: str) -> None:
    recipe = run.recipe
    share = general_share(run)

    def action(folder: Path) -> None:
        member = run.chunk(domain, stage="cut")
        result = adapt(
            member,
            run.lessons[domain],
            run.lessons[GENERAL],
            general_share=share,
            tokens=recipe.adapt.tokens,
            settings=recipe.adapt,
            seed=recipe.seed,
            folder=folder / "training",
            report=lambda line: run.report(f"adapt/{domain}: {line}"),
        )
        save_chunk(member, run.tokenizer, folder)
        write_json(folder / ADAPT_FILE, {**asdict(result), "general_share": share})

    facts = {"adapt": recipe.adapt.model_dump(), "general_share": share, "seed": recipe.seed}
    upstream = [f"cut/{domain}", *_taught(run)]
    run.stages.run(f"adapt/{domain}", action, settings=facts, upstream=upstream)


def _corpora_stages(run: Run) -> list[str]:
    return [f"corpora/{name}" for name in _sources(run.recipe)]
