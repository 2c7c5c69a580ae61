"""What every stage of one run works with: the recipe, the base, the corpora and the folders.

Everything is read from the stages' folders when it is first asked for, so a stage that is skipped
costs nothing. It knows where things are, not how they are made.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from models.downscale.adapt import choose_device, mean_loss
from models.downscale.base import load_base
from models.downscale.corpus import Corpus, Example, read_corpus
from models.downscale.errors import CorpusError
from models.downscale.importance import Importance, load_importance
from models.downscale.recipe import ALL_DOMAINS, Recipe
from models.downscale.render import Renderer
from models.downscale.stage import Stages
from models.downscale.teacher import with_lessons
from models.tasks import Split
from models.training.data import Conversation

GENERAL: Final = "general"
# What a stage leaves in its folder, beside a checkpoint.
CORPUS_FILE: Final = "corpus.jsonl"
IMPORTANCE_FILE: Final = "importance.npz"
CUT_FILE: Final = "cut.json"
SELECTION_FILE: Final = "selection.json"
ADAPT_FILE: Final = "adapt.json"
_MAX_UNKNOWN_SHARE: Final = 0.05


@dataclass(kw_only=True)
class Run:
    """One run. `base_folder` is the base's checkpoint; members are called like their domains."""

    recipe: Recipe
    stages: Stages
    base_folder: Path
    report: Callable[[str], None]

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains, in the recipe's order."""
        return tuple(self.recipe.domains)

    @cached_property
    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        return load_base(self.base_folder)

    @property
    def base(self) -> PreTrainedModel:
        """The base in fp32, shared: not to be trained."""
        return self._loaded[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The base's tokenizer, which all members share; it has a chat template."""
        return self._loaded[1]

    @cached_property
    def _renderer(self) -> Renderer:
        return Renderer(self.tokenizer)

    @cached_property
    def _corpora(self) -> dict[str, Corpus]:
        return {}

    @cached_property
    def _rendered(self) -> dict[tuple[str, Split], list[Conversation]]:
        return {}

    def corpus(self, name: str) -> Corpus:
        """The corpus of a domain, or the general one: all domains in equal parts, or its own."""
        if name not in self._corpora:
            if name == GENERAL and self.recipe.general.corpus == ALL_DOMAINS:
                parts = [self.corpus(domain) for domain in self.domains]
                examples = [example for split in Split for example in _interleaved(parts, split)]
                self._corpora[name] = Corpus(name=name, examples=tuple(examples))
            else:
                file = self.stages.folder(f"corpora/{name}") / CORPUS_FILE
                self._corpora[name] = read_corpus(name, file)
        return self._corpora[name]

    def conversations(self, name: str, split: Split = Split.TRAIN) -> list[Conversation]:
        """The corpus of `name` as token ids, none longer than `adapt.row_tokens`."""
        key = name, split
        if key not in self._rendered:
            self._rendered[key] = self.render(name, self.corpus(name).of(split))
        return self._rendered[key]

    def render(self, name: str, examples: Sequence[Example]) -> list[Conversation]:
        """Token ids of `examples` of the corpus `name`.

        Raises:
            CorpusError: the tokenizer does not know what the corpus is written in.
        """
        rendered = self._renderer.render(examples, max_tokens=self.recipe.adapt.row_tokens)
        unknown = self.tokenizer.unk_token_id
        if unknown is not None:
            tokens = [token for one in rendered for token in one.tokens]
            share = tokens.count(unknown) / max(len(tokens), 1)
            if share > _MAX_UNKNOWN_SHARE:
                raise CorpusError(
                    f"{name}: {share:.0%} of the corpus is unknown to the base's tokenizer; "
                    "is it the tokenizer of another language?"
                )
        return rendered

    def selected(self, name: str) -> list[Conversation]:
        """The training conversations of a domain that the selection kept; for the general corpus
        of all domains, those of each in turn; for a general corpus of its own, all of them."""
        if name == GENERAL:
            if self.recipe.general.corpus != ALL_DOMAINS:
                return self.conversations(GENERAL)
            parts = [self.selected(domain) for domain in self.domains]
            return [one for together in zip(*parts, strict=False) for one in together]
        file = self.stages.folder(f"select/{name}") / SELECTION_FILE
        indices: list[int] = json.loads(file.read_text())["kept"]
        conversations = self.conversations(name)
        return [conversations[i] for i in indices]

    @cached_property
    def lessons(self) -> dict[str, list[Conversation]]:
        """`selected` by domain, and "general", with what the base says of them."""
        names = (*self.domains, GENERAL)
        corpora = {name: self.selected(name) for name in names}
        if self.recipe.adapt.distill.weight == 0:
            return corpora
        return with_lessons(corpora, self.stages.folder("lessons"))

    def importance(self, name: str) -> Importance:
        """What domain `name` uses of the base, by its activations."""
        return load_importance(self.stages.folder(f"calibrate/{name}") / IMPORTANCE_FILE)

    def held_out_loss(
        self, model: PreTrainedModel, name: str, split: Split = Split.ROUTER
    ) -> float:
        """Nats per answer token of `model` on the held-out examples of a domain."""
        row_tokens = self.recipe.adapt.row_tokens
        return mean_loss(model, self.conversations(name, split), row_tokens=row_tokens)

    def loss(self, model: PreTrainedModel, conversations: Sequence[Conversation]) -> float:
        """Nats per answer token of `model` on these conversations."""
        return mean_loss(model, conversations, row_tokens=self.recipe.adapt.row_tokens)

    def fresh_base(self) -> PreTrainedModel:
        """A copy of the base in fp32, to be trained."""
        return copy.deepcopy(self.base)

    def chunk(self, name: str, *, stage: str = "adapt") -> PreTrainedModel:
        """A fresh copy of member `name` as `stage` ("cut", "warm" or "adapt") left it, in fp32."""
        return load_chunk(self.stages.folder(f"{stage}/{name}"))


@contextmanager
def placed(model: PreTrainedModel, device: str) -> Iterator[PreTrainedModel]:
    """Have `model` on a device ("auto": the GPU if there is one) for a while, then on the CPU."""
    model.to(choose_device(device))  # type: ignore[arg-type]
    try:
        yield model
    finally:
        model.to("cpu")  # type: ignore[arg-type]


def save_chunk(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a checkpoint that transformers loads, with its tokenizer."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_chunk(folder: Path) -> PreTrainedModel:
    """Load a checkpoint in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert isinstance(model, PreTrainedModel)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def _interleaved(corpora: Sequence[Corpus], split: Split) -> list[Example]:
    """Equally many examples of each corpus, in turn."""
    parts = [corpus.of(split) for corpus in corpora]
    return [example for together in zip(*parts, strict=False) for example in together]
