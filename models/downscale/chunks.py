"""The stages that make a chunk: what its domain uses, the cut, its examples and its training.

Each takes the run and the name of a domain, depends on what its `upstream` names, and does nothing
where nothing changed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel

from models.downscale.adapt import adapt
from models.downscale.architecture import num_parameters
from models.downscale.calibrate import activation_importance
from models.downscale.cut import cut
from models.downscale.importance import save_importance
from models.downscale.mixture import general_share
from models.downscale.progress import progress_bar
from models.downscale.run import (
    ADAPT_FILE,
    CUT_FILE,
    GENERAL,
    IMPORTANCE_FILE,
    SELECTION_FILE,
    Run,
    placed,
    save_chunk,
)
from models.downscale.select import Selection, select, select_at_random
from models.downscale.shapes import solve_shape
from models.downscale.spectrum import spectrum_importance
from models.downscale.stage import write_json
from models.downscale.teacher import write_lessons
from models.training.data import Conversation
from models.training.score import Scorer


def calibrate(run: Run, domain: str) -> None:
    """Stage "calibrate/…": what of the base the domain uses."""
    settings = run.recipe.cut

    def action(folder: Path) -> None:
        examples = run.conversations(domain)
        rng = random.Random(f"calibrate/{run.recipe.seed}")
        sample = rng.sample(examples, min(settings.calibration_examples, len(examples)))
        with placed(run.base, run.recipe.adapt.device) as base:
            save_importance(activation_importance(base, sample), folder / IMPORTANCE_FILE)

    facts = {
        "examples": settings.calibration_examples,
        "row_tokens": run.recipe.adapt.row_tokens,
        "seed": run.recipe.seed,
    }
    upstream = ["base", f"corpora/{domain}"]
    run.stages.run(f"calibrate/{domain}", action, settings=facts, upstream=upstream)


def cut_out(run: Run, domain: str) -> None:
    """Stage "cut/…": the chunk as it is cut from the base."""
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


def warm(run: Run, domain: str) -> None:
    """Stage "warm/…": the cut chunk a little trained on general data, to judge examples."""
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
    upstream = [f"cut/{domain}", *corpora_stages(run)]
    run.stages.run(f"warm/{domain}", action, settings=facts, upstream=upstream)


def select_examples(run: Run, domain: str) -> None:
    """Stage "select/…": which of the domain's examples are trained on."""
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

    device = run.recipe.adapt.device
    with ExitStack() as stack:
        members = [run.chunk(member, stage="warm") for member in ensemble]
        selection = select(
            [stack.enter_context(placed(member, device)) for member in members],
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


def teach(run: Run) -> None:
    """Stage "lessons": what the base says of every selected example, once for all chunks."""
    if run.recipe.adapt.distill.weight == 0:
        return
    settings = run.recipe.adapt

    def action(folder: Path) -> None:
        corpora = {name: run.selected(name) for name in (*run.domains, GENERAL)}
        total = len({tuple(one.tokens) for corpus in corpora.values() for one in corpus})
        with (
            placed(run.base, settings.device) as base,
            progress_bar(total, "lessons", unit="examples") as advance,
        ):
            scorer = Scorer(
                base,
                row_tokens=settings.row_tokens,
                compiled=settings.compiled,
                dtype=torch.bfloat16 if settings.precision == "bfloat16" else torch.float32,
            )
            tokens = write_lessons(base, corpora, folder, scorer=scorer, progress=advance)
        run.report(f"lessons: the base read {tokens:,} tokens")

    facts = {"row_tokens": settings.row_tokens, "precision": settings.precision}
    upstream = ["base", *corpora_stages(run), *(f"select/{domain}" for domain in run.domains)]
    run.stages.run("lessons", action, settings=facts, upstream=upstream)


def taught_stages(run: Run) -> list[str]:
    """Return the stages that training reads: which examples, and what the base says of them."""
    selected = [f"select/{domain}" for domain in run.domains]
    lessons = [] if run.recipe.adapt.distill.weight == 0 else ["lessons"]
    return [*corpora_stages(run), *selected, *lessons]


def train(run: Run, domain: str) -> None:
    """Stage "adapt/…": the chunk's training, mixed with general data and the base's lessons."""
    settings, seed = run.recipe.adapt_of(domain), run.recipe.seed
    share = general_share(run)

    def action(folder: Path) -> None:
        member = run.chunk(domain, stage="cut")
        result = adapt(
            member,
            run.lessons[domain],
            run.lessons[GENERAL],
            general_share=share,
            tokens=settings.tokens,
            settings=settings,
            seed=seed,
            folder=folder / "training",
            report=lambda line: run.report(f"adapt/{domain}: {line}"),
        )
        save_chunk(member, run.tokenizer, folder)
        write_json(folder / ADAPT_FILE, {**asdict(result), "general_share": share})

    facts = {"adapt": settings.model_dump(), "general_share": share, "seed": seed}
    upstream = [f"cut/{domain}", *taught_stages(run)]
    run.stages.run(f"adapt/{domain}", action, settings=facts, upstream=upstream)


def corpora_stages(run: Run) -> list[str]:
    """Return the stages that hold the corpora."""
    return [f"corpora/{name}" for name in run.recipe.corpora]
