"""The whole way from a recipe to a pool, in the order in which it is gone.

What is known to fail is refused before anything is written; a pool appears where it is wanted only
when it is whole and loads.
"""

from __future__ import annotations

import errno
import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from models.downscale.adapters import has_adapters
from models.downscale.answers import measure
from models.downscale.base import base, check_base, find_base, trained_parameters
from models.downscale.chunks import BASE, calibrate, cut_out, select_examples
from models.downscale.corpora import corpora, sources
from models.downscale.examples import lengths
from models.downscale.members import general_share, train_chunk
from models.downscale.pool import pool
from models.downscale.questions import questions
from models.downscale.recipe import Recipe
from models.downscale.stage import MARKS, Run
from models.downscale.texts import files_of
from models.errors import CorpusError, OutputError, RecipeError
from models.pool import load_pool

# Weights and two moments in fp32, kept at the start of the decay and at the end, and a third time
# while the last is being replaced.
_CHECKPOINT_BYTES_PER_PARAMETER: Final = 3 * 4 * 3
# The base as a member and in the pool, both in bfloat16, dequantized, and with less of its words
# in fp32.
_BASE_BYTES_PER_PARAMETER: Final = 2 + 2 + 4 + 4
# The base's likeliest tokens (ids and log-probabilities) and the text itself.
_BYTES_PER_CORPUS_TOKEN: Final = 64
_TOKENS_PER_EXAMPLE: Final = 64
# Of an adapter of a model of a billion parameters, which is more than is trained on a CPU.
_PARAMETERS_PER_RANK: Final = 1_000_000
_ALWAYS_BYTES: Final = 100 * 2**20


def downscale(
    recipe: Recipe, out: Path, *, resume: bool = False, report: Callable[[str], None] = print
) -> Path:
    """Make the pool of `recipe` in the folder `out` and return it.

    Raises:
        DownscaleError: something that the user can put right; nothing half-written is left where
            a pool would be, and with `resume` the run goes on from what was done.
    """
    check_before_work(recipe, out)
    with claimed(out, resume=resume) as work, full_disk_named(out):
        run = Run(recipe, work, report=report)
        base(run)
        for name in recipe.corpora:
            corpora(run, name)
        for name in recipe.corpora:
            lengths(run, name)
        questions(run)  # what cannot be measured is better known before training
        cuts = () if has_adapters(run) else (calibrate, cut_out)
        for stage in (*cuts, select_examples):
            for domain in run.domains:
                stage(run, domain)
        general_share(run)
        for domain in run.domains:
            train_chunk(run, domain)
        for name in (*run.domains, BASE):
            measure(run, name)
        assembled = pool(run)
        load_pool(assembled)  # what does not load is not published
        publish(assembled, out)
    return out


def check_before_work(recipe: Recipe, out: Path) -> None:
    """Raise `DownscaleError` for what can be known to fail; nothing has been written yet."""
    if recipe.base.checkpoint is not None:
        given = find_base(recipe.base.checkpoint)
        card = check_base(given, row_tokens=recipe.adapt.row_tokens)
        base_parameters = card.parameters
        if recipe.adapt.row_tokens > card.context_tokens:
            raise RecipeError(
                f"adapt.row_tokens: {recipe.adapt.row_tokens} is more than the base's context of "
                f"{card.context_tokens} tokens"
            )
    else:
        assert recipe.base.train is not None
        base_parameters = trained_parameters(recipe.base.train)
    corpus_bytes = 0
    read = [] if recipe.base.checkpoint is None else [given]
    for name, settings in recipe.corpora.items():
        for source in sources(settings):
            read.append(source)
            try:
                files, _ = files_of(source)
            except CorpusError as error:
                raise CorpusError(f"{name}: {error}") from None
            corpus_bytes += sum(file.stat().st_size for file in files)
    for folder in read:
        if out.resolve().is_relative_to(folder.resolve()):
            raise OutputError(f"--out: {out} is within {folder}, which the run reads")
    needed = needed_bytes(recipe, base_parameters=base_parameters, corpus_bytes=corpus_bytes)
    check_room(out, needed)


def needed_bytes(recipe: Recipe, *, base_parameters: int, corpus_bytes: int) -> int:
    """Return an upper estimate of what a run writes; `corpus_bytes` is the corpora's own size."""
    target = recipe.members.target(base_parameters)
    if recipe.members.adapters is not None:
        target = min(base_parameters, recipe.members.adapters.rank * _PARAMETERS_PER_RANK)
    trained = len(recipe.domains) * target
    trained += base_parameters if recipe.base.train is not None else 0
    if recipe.adapt.distill.teacher == "domain":
        trained += len(recipe.domains) * base_parameters
    examples = sum(corpus.examples for corpus in recipe.domains.values())
    corpora = max(2 * corpus_bytes, examples * _TOKENS_PER_EXAMPLE) * _BYTES_PER_CORPUS_TOKEN // 4
    copies = base_parameters * _BASE_BYTES_PER_PARAMETER
    return _ALWAYS_BYTES + corpora + copies + trained * _CHECKPOINT_BYTES_PER_PARAMETER


def free_bytes(folder: Path) -> int:
    """Return the free room where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def check_room(out: Path, needed: int, *, free: Callable[[Path], int] = free_bytes) -> None:
    """Raise `OutputError` if the disk of `out` has less than `needed` bytes free."""
    room = free(out.resolve())
    if room < needed:
        raise OutputError(
            f"{out}: this run needs about {needed / 2**30:.1f} GiB of disk, "
            f"{room / 2**30:.1f} GiB are free"
        )


@contextmanager
def full_disk_named(out: Path) -> Iterator[None]:
    """Turn whatever a full disk under `out` raises, in any library, into an `OutputError`."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        # safetensors has an error of its own, NumPy one without a number.
        if not full and "os error 28" not in str(error) and free_bytes(out) > 2**20:
            raise
        raise OutputError(
            f"{out}: no space is left on its disk; make room, then go on with --resume"
        ) from error


@contextmanager
def claimed(out: Path, *, resume: bool) -> Iterator[Path]:
    """Hold the output folder for one run, and yield its work folder.

    Raises:
        OutputError: it holds something already and `resume` is off, or another run is at work.
    """
    work = out / ".work"
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; --out needs a folder")
    if not resume and out.is_dir() and any(out.iterdir()):
        what = "an unfinished run" if work.is_dir() else "files already"
        what = "a pool already" if (out / "pool.yaml").exists() else what
        raise OutputError(f"{out} holds {what}; pass --resume to go on from it, or remove it")
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"another run is at work in {out}") from None
        yield work


def publish(assembled: Path, out: Path) -> None:
    """Put what stands in `assembled` into `out`, `pool.yaml` last: without it there is no pool.

    What an earlier run put there under the same names is replaced. `assembled` stays, so that a
    later run need not do it again.
    """
    moving = out / ".work" / "moving"
    shutil.rmtree(moving, ignore_errors=True)
    shutil.copytree(assembled, moving, ignore=shutil.ignore_patterns(*MARKS))
    (out / "pool.yaml").unlink(missing_ok=True)
    for entry in sorted(moving.iterdir(), key=lambda entry: entry.name == "pool.yaml"):
        target = out / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.rename(target)
    moving.rmdir()
