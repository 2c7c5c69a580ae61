"""The corpora of a run, read or generated and divided, as text.

Whatever is left out is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from models.downscale.corpus import (
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
from models.downscale.stage import Run, remembered, stage
from models.tasks.base import Split

GENERAL: Final = "general"
_CORPUS: Final = "corpus.jsonl"


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


def sources(settings: CorpusSettings) -> list[Path]:
    """The files or folders that a corpus is read from; none for a generator."""
    names = [] if settings.corpus.startswith(TASKS) else [settings.corpus]
    names += [settings.held_out] if settings.held_out is not None else []
    return [Path(name) for name in names]


def _but_not(left_out: Mapping[str, int]) -> str:
    """The end of a sentence that says what is left out, and nothing where nothing is."""
    parts = ", ".join(f"{count:,} {what}" for what, count in left_out.items())
    return f"; left out: {parts}" if parts else ""


def _interleaved(parts: Sequence[Corpus], split: Split) -> list[Example]:
    """Equally many examples of each corpus, in turn."""
    examples = [part.of(split) for part in parts]
    return [example for together in zip(*examples, strict=False) for example in together]
