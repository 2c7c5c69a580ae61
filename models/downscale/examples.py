"""The corpora of a run, from their sources to the token ids that everything else works with.

A conversation that is longer than a row cannot be learnt whole, so it is left out; a text is cut
into rows. Whatever is left out is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from models.downscale.base import base_model
from models.downscale.corpus import (
    MIN_TRAIN_EXAMPLES,
    Corpus,
    Example,
    generate_corpus,
    gives_away,
    held_out_questions,
    load_corpus,
    read_corpus,
    without_copies,
    write_corpus,
)
from models.downscale.recipe import ALL_DOMAINS, TASKS, CorpusSettings
from models.downscale.render import Renderer
from models.downscale.stage import Run, remembered, stage, write_json
from models.errors import CorpusError
from models.tasks.base import Split
from models.training.data import Conversation

GENERAL: Final = "general"
_CORPUS, _LENGTHS = "corpus.jsonl", "lengths.json"
_MAX_UNKNOWN_SHARE: Final = 0.05
# Where fewer fit a row than this, the rows are too short for the corpus.
_MIN_FITTING_SHARE: Final = 0.1


@stage("corpora")
def corpora(run: Run, folder: Path, name: str) -> None:
    """Stage: the corpus of a domain, or a general one of its own, in splits."""
    settings = run.recipe.general if name == GENERAL else run.recipe.domains[name]
    if settings.corpus.startswith(TASKS):
        measure = run.recipe.measure
        held_out = max(measure.router_questions, measure.test_questions)
        corpus = generate_corpus(name, settings, held_out=held_out, seed=run.recipe.seed)
    else:
        for source in sources(settings):
            run.read(source)
        corpus = load_corpus(name, settings)
    write_corpus(corpus, folder / _CORPUS)
    sizes = ", ".join(f"{len(corpus.of(split)):,} {split}" for split in Split)
    run.report(f"corpora/{name}: {sizes}{_but_not(corpus.left_out)}")


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
def corpus(run: Run, name: str) -> Corpus:
    """The corpus of a domain, or the general one: all domains in equal parts, or its own.

    What the domains hold out does not stand in the general corpus's training split.
    """
    if name != GENERAL:
        return read_corpus(name, corpora(run, name) / _CORPUS)
    domains = [corpus(run, domain) for domain in run.domains]
    left_out: Counter[str] = Counter()
    if run.recipe.general.corpus == ALL_DOMAINS:
        mixed = [one for split in Split for one in _interleaved(domains, split)]
        longer = sum(len(domain.examples) for domain in domains) - len(mixed)
        left_out["of longer domains, so that all have equal parts"] = longer
    else:
        mixed = list(read_corpus(name, corpora(run, name) / _CORPUS).examples)
    held_out = [e for domain in domains for e in domain.examples if e.split is not Split.TRAIN]
    asked = held_out_questions(held_out)
    kept = [e for e in mixed if e.split is not Split.TRAIN or not gives_away(e.asked, asked)]
    if run.recipe.general.corpus != ALL_DOMAINS:
        kept = without_copies(kept, left_out, of=held_out)
    left_out["that give away what a domain holds out"] = (
        len(mixed) - len(kept) - left_out["exact copies"] - left_out["near copies"]
    )
    run.report(f"general: {len(kept):,} examples{_but_not(+left_out)}")
    return Corpus(name=name, examples=tuple(kept), left_out=+left_out)


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


def sources(settings: CorpusSettings) -> list[Path]:
    """The files or folders that a corpus is read from; none for a generator."""
    names = [] if settings.corpus.startswith(TASKS) else [settings.corpus]
    names += [settings.held_out] if settings.held_out is not None else []
    return [Path(name) for name in names]


def _but_not(left_out: Mapping[str, int]) -> str:
    """The end of a sentence that says what is left out, and nothing where nothing is."""
    parts = ", ".join(f"{count:,} {what}" for what, count in left_out.items())
    return f"; left out: {parts}" if parts else ""


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


def _interleaved(parts: Sequence[Corpus], split: Split) -> list[Example]:
    """Equally many examples of each corpus, in turn."""
    examples = [part.of(split) for part in parts]
    return [example for together in zip(*examples, strict=False) for example in together]
