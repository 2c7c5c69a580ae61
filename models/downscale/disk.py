"""How much room a run needs on the disk, checked before any work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final

from models.downscale.errors import OutputError
from models.downscale.recipe import Recipe

# Weights and two moments in fp32, kept at the start of the decay and at the end, and a third time
# while the last is being replaced.
_CHECKPOINT_BYTES_PER_PARAMETER: Final = 3 * 4 * 3
# The base's likeliest tokens (ids and log-probabilities) and the text itself.
_BYTES_PER_CORPUS_TOKEN: Final = 64
_TOKENS_PER_EXAMPLE: Final = 64
_ALWAYS_BYTES: Final = 100 * 2**20


def needed_bytes(recipe: Recipe, *, base_parameters: int, corpus_bytes: int) -> int:
    """Return an upper estimate of what a run writes; `corpus_bytes` is the corpora's own size."""
    target = recipe.members.target(base_parameters)
    trained = len(recipe.domains) * target
    for baseline in recipe.baselines:
        trained += base_parameters if baseline == "finetuned" else len(recipe.domains) * target
    trained += base_parameters if recipe.base.train is not None else 0
    examples = sum(corpus.examples for corpus in recipe.domains.values())
    corpora = max(2 * corpus_bytes, examples * _TOKENS_PER_EXAMPLE) * _BYTES_PER_CORPUS_TOKEN // 4
    return _ALWAYS_BYTES + corpora + trained * _CHECKPOINT_BYTES_PER_PARAMETER


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
