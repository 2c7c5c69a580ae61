"""The corpora of a run as the token ids that everything else works with.

A conversation that is longer than a row cannot be learnt whole, so it is left out; a text is cut
into rows. Whatever is left out is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from models.downscale.corpora import corpus
from models.downscale.corpus import MIN_TRAIN_EXAMPLES, Example
from models.downscale.render import Renderer
from models.downscale.stage import Run, remembered, stage, write_json
from models.downscale.vocabulary import base_model
from models.errors import CorpusError
from models.tasks.base import Split
from models.training.data import Conversation

_LENGTHS: Final = "lengths.json"
_MAX_UNKNOWN_SHARE: Final = 0.05
# Where fewer fit a row than this, the rows are too short for the corpus.
_MIN_FITTING_SHARE: Final = 0.1


@stage("lengths")
def lengths(run: Run, folder: Path, name: str) -> None:
    """Stage: how much of a corpus fits a row; refuses one of which hardly anything does.

    Raises:
        CorpusError: too little fits, or the tokenizer does not know what it is written in.
    """
    row_tokens = run.recipe.adapt.row_tokens
    found = {}
    for split in Split:
        rendered = _rendered(run, name, split)
        sizes = np.array([len(one.tokens) for one in rendered])
        if split is Split.TRAIN:
            _check_language(run, name, rendered)
        fitting = int((sizes <= row_tokens).sum())
        found[split.value] = {"examples": len(sizes), "fitting": fitting}
        if fitting == len(sizes):
            continue
        what = (
            f"{name}: {len(sizes) - fitting:,} of {len(sizes):,} examples of the split {split} are "
            f"longer than adapt.row_tokens, {row_tokens}, and left out; {sizes.max()} would hold "
            f"all of them, {int(np.quantile(sizes, 0.95))} 95%"
        )
        least = MIN_TRAIN_EXAMPLES if split is Split.TRAIN else 1
        if fitting < max(least, _MIN_FITTING_SHARE * len(sizes)):
            raise CorpusError(what)
        run.report(what)
    write_json(folder / _LENGTHS, found)


@remembered
def conversations(run: Run, name: str, split: Split) -> list[Conversation]:
    """A split of the corpus of `name` as token ids, as far as it fits `adapt.row_tokens`."""
    row_tokens = run.recipe.adapt.row_tokens
    return [one for one in _rendered(run, name, split) if len(one.tokens) <= row_tokens]


def render(run: Run, examples: Sequence[Example]) -> list[Conversation]:
    """Token ids of `examples`, however long the conversations among them are."""
    return renderer(run).render(examples, max_tokens=run.recipe.adapt.row_tokens)


@remembered
def renderer(run: Run) -> Renderer:
    """The renderer of the base's tokenizer."""
    return Renderer(base_model(run)[1])


@remembered
def _rendered(run: Run, name: str, split: Split) -> list[Conversation]:
    return render(run, corpus(run, name).of(split))


def _check_language(run: Run, name: str, rendered: Sequence[Conversation]) -> None:
    unknown = base_model(run)[1].unk_token_id
    tokens = [token for one in rendered for token in one.tokens]
    share = tokens.count(unknown) / max(len(tokens), 1) if unknown is not None else 0.0
    if share > _MAX_UNKNOWN_SHARE:
        raise CorpusError(
            f"{name}: {share:.0%} of the corpus is unknown to the base's tokenizer; "
            "is it the tokenizer of another language?"
        )
