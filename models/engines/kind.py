"""What a kind of engine tells before one is made: its options, what it can do and what it needs.

Each kind stands beside its engine and imports no tensor library, since every process that reads a
pool file asks it. `registry` finds it by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Literal, TypeAlias, TypeVar

from pydantic import BaseModel

from models.answer_format import PLAIN, AnswerFormat
from models.card import ModelCard
from models.engines.base import Encodes, Engine, FusionRule, StructureKind
from models.errors import PoolError
from models.spec import Dtype, EngineSpec, Model

Options = TypeVar("Options", bound=BaseModel)
Format: TypeAlias = Literal["safetensors", "gguf"]


@dataclass(frozen=True, kw_only=True)
class EngineTraits:
    """What plans, requests, meters and deployments must know of one engine of a pool.

    `fuses`: one request may name several members, by one of `rules`, and with `updates_evidence`
    their weights may follow the answer's tokens. `logprobs`: answers carry log-probabilities, which
    scorers of cascades read; where it `reads`, those of a prompt cost next to nothing. `formats`
    says by model how calls and reasoning are written; `tools` that this is another server's affair,
    and `media` that all but texts is. Answers can be held to the kinds of `structures`. It
    `refuses` some of the fields of `requests.OPTIONAL`. `encodes` says by model what it tells of
    texts; such a model writes no answers. `here`: it draws its energy from this machine.
    `context_tokens` bounds prompt and answer further than the models do. A replica spreads over
    `num_workers` devices. `leads` are other engines' models of which it keeps a copy: one may come
    first in a "gated" answer of its own. With `metrics`, it is a `HasMetrics`. `needs` says what is
    missing for it to run on this machine.
    """

    fuses: bool = True
    rules: tuple[FusionRule, ...] = ("mixture", "product", "gated", "contrastive")
    updates_evidence: bool = True
    logprobs: bool = True
    reads: bool = True
    tools: bool = False
    media: bool = False
    structures: tuple[StructureKind, ...] = ("json", "regex", "choice", "grammar")
    refuses: frozenset[str] = frozenset()
    encodes: Mapping[str, tuple[Encodes, ...]] = field(default_factory=dict)
    here: bool = True
    context_tokens: int | None = None
    num_workers: int = 1
    leads: tuple[str, ...] = ()
    metrics: bool = False
    needs: str | None = None
    formats: Mapping[str, AnswerFormat] = field(default_factory=dict)

    def answer_format(self, members: Sequence[str]) -> AnswerFormat:
        """Return how `members` answer together: as the first does, whose template asks them."""
        return self.formats.get(members[0], PLAIN) if members else PLAIN

    @property
    def marks(self) -> frozenset[str]:
        """Tokens that stand in the models' texts, whatever their tokenizers say of them."""
        return frozenset(mark for form in self.formats.values() for mark in form.marks)

    def adopting(self, name: str, base: str) -> EngineTraits:
        """Return them with an adapter of `base` among the models."""
        return replace(self, formats={**self.formats, name: self.formats[base]})

    def calls(self, members: Sequence[str]) -> bool:
        """Return whether `members` together can be offered tools: all write calls alike."""
        ways = {self.formats.get(name, PLAIN).calls for name in members}
        return self.tools or (len(ways) == 1 and None not in ways)


@dataclass(frozen=True, kw_only=True)
class EngineKind(Generic[Options]):
    """One kind of engine.

    `options` is the schema of the engine's `options` in pool.yaml; it refuses unknown keys.
    `inspect` checks options and models as far as that goes without loading anything, and raises
    `PoolError`. `create` makes the engine of what `inspect` has passed, and imports what that
    takes; the engine's `start` loads. `formats` are the checkpoints that it reads: folders of
    "safetensors", files of "gguf"; none for one that reads none. It computes in one of `dtypes`.
    With `remote` its models are another server's; with `adapters` they may be adapters of one base;
    with `leads` those of other engines may lead its own. The options `beside_answers` decide when
    answers come, and never what they say.
    """

    options: type[Options]
    inspect: Callable[[EngineSpec, Options, Sequence[Model]], EngineTraits]
    create: Callable[[EngineSpec, Options, Sequence[Model]], Engine]
    formats: tuple[Format, ...] = ()
    dtypes: tuple[Dtype, ...] = ("auto", "float32", "bfloat16", "float16")
    remote: bool = False
    adapters: bool = False
    leads: bool = False
    beside_answers: frozenset[str] = frozenset()


def base_of(spec: EngineSpec, models: Sequence[Model]) -> Model | None:
    """Return the one base whose adapters are among `models`; None where none are.

    Raises `PoolError` for adapters beside a second base.
    """
    if all(model.adapter is None for model in models):
        return None
    first, *rest = [model for model in models if model.adapter is None]
    if rest:
        raise PoolError(
            f"engines.{spec.name}: adapters share an engine with their base alone, but "
            f"{rest[0].name!r} is another; give it an engine of its own"
        )
    return first


def only_card(spec: EngineSpec, models: Sequence[Model]) -> ModelCard:
    """Return the checkpoint of an engine's one model; raises `PoolError` where it has several."""
    if len(models) != 1:
        which = "an" if spec.kind[0] in "aeiou" else "a"
        raise PoolError(
            f"engines.{spec.name}: {which} {spec.kind} engine runs one model, not {len(models)}; "
            "give each an engine of its own"
        )
    card = models[0].card
    assert card is not None, "the registry refuses models without one"
    return card


def formats_of(models: Sequence[Model]) -> dict[str, AnswerFormat]:
    """Return how each of `models` answers; raises `PoolError` for a template it cannot read."""
    return {model.name: model.answer_format for model in models}


def check_one_shape(spec: EngineSpec, models: Sequence[Model]) -> None:
    """Refuse `models` that cannot be stacked: with other sizes or another tokenizer than the first.

    Raises `PoolError`.
    """
    where, what = f"engines.{spec.name}", f"members of one {spec.kind} engine"
    first, *rest = [(model.name, model.card) for model in models if model.card]
    for name, card in rest:
        if card.shape != first[1].shape:
            raise PoolError(
                f"{where}: {what} need one shape, but {name!r} has "
                f"{card.shape} and {first[0]!r} has {first[1].shape}"
            )
        if card.tokenizer_sha256 != first[1].tokenizer_sha256:
            raise PoolError(
                f"{where}: {what} need one tokenizer, but that of {name!r} "
                f"differs from that of {first[0]!r}"
            )
