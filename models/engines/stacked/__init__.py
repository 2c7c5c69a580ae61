"""The stacked engine: M same-shaped small models run as one block-diagonal transformer.

The unit of work is a *lane*: one request on one member, with its own cache rows. A request that
uses k members costs k lanes, whatever the engine holds. One step, in `loop`:

    take what came in → `scheduler` picks parts, `cache` gives them rows → `layout` indexes them
    → `model` computes logits → `fusion` joins lanes → `sampler` draws → `sequence` turns tokens
    into text → send

Two rooms make a step do more or less than one token on all lanes: `drafts` guesses tokens that are
checked together, `lead` asks the others only where the lead of a "gated" answer is unsure.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from models.card import ModelCard
from models.engines.base import Engine
from models.engines.kind import EngineKind, EngineTraits, base_of, check_one_shape, formats_of
from models.engines.stacked.architecture import read_stack
from models.errors import PoolError
from models.spec import EngineSpec, Model
from policies.kinds import Strict


class DraftingMember(Strict):
    """The member that guesses. One of another shape than the others does nothing else."""

    member: str


class StackedOptions(Strict):
    """The engine's `options` in pool.yaml.

    `step_rows` bounds how many token rows (tokens times lanes) one step may hold: more makes
    prompts faster and the gaps between streamed tokens longer. Tokens come out at most every
    `stream_interval_ms`, several at a time if steps are faster, but the first and the last of an
    answer at once: the event loop's work would hold up the steps otherwise. `num_threads` is the
    most CPU threads that a step gets (see `threads`); None: as many as torch has. A step
    that takes longer than `step_timeout_s` is taken to hang: what runs fails, and the engine is
    started again. With `prefix_cache` a prompt starts from the keys and values of an earlier one
    that began alike (see `cache`). Adapters of the one base, those of the pool and those loaded
    while it serves, stay in memory, at most `max_adapters` of them: then the least recently used
    makes room, and comes back when it is asked for. Prompt and answer have `context_tokens` at
    most; None: as many as the model knows. `draft` says who guesses tokens that are then
    checked several at a time (see `drafts`): "ngram" what followed the last ones before, "heaviest"
    the member with the largest weight of each fused answer, or one `member` always; None: nobody.
    """

    step_rows: int = Field(2048, ge=1)
    stream_interval_ms: float = Field(10.0, ge=0)
    num_threads: int | None = Field(None, ge=1)
    step_timeout_s: float = Field(300.0, gt=0)
    prefix_cache: bool = True
    max_adapters: int = Field(64, ge=1)
    context_tokens: int | None = Field(None, ge=1)
    draft: Literal["ngram", "heaviest"] | DraftingMember | None = None


def _inspect(spec: EngineSpec, options: StackedOptions, models: Sequence[Model]) -> EngineTraits:
    answering, guests = _split(spec, options, models)
    check_one_shape(spec, answering)
    base_of(spec, answering)
    num_adapters = sum(model.adapter is not None for model in models)
    if num_adapters > options.max_adapters:
        raise PoolError(
            f"engines.{spec.name}.options.max_adapters: {options.max_adapters} is too few for the "
            f"pool's {num_adapters} adapters"
        )
    for stack in (answering, guests) if guests else (answering,):
        read_stack([model.card for model in stack if model.card and model.adapter is None])
    return _traits(spec, options, answering, guests)


def _traits(
    spec: EngineSpec, options: StackedOptions, answering: Sequence[Model], guests: Sequence[Model]
) -> EngineTraits:
    leads = [model for model in guests if model.name in spec.leads]
    names = tuple(model.name for model in leads)
    return EngineTraits(
        formats=formats_of([*answering, *leads]),
        context_tokens=options.context_tokens,
        leads=names,
    )


def _split(
    spec: EngineSpec, options: StackedOptions, models: Sequence[Model]
) -> tuple[list[Model], list[Model]]:
    """Return who answers here, and the guests of another shape that only lead or draft."""
    own = [model for model in models if model.name not in spec.leads]
    leads = [model for model in models if model.name in spec.leads]
    draft = options.draft
    drafts_too = isinstance(draft, DraftingMember) and draft.member in [m.name for m in leads]
    guesser = None if drafts_too else _guesser(spec, options, own)
    answering = [model for model in own if model is not guesser]
    guests = [*leads, guesser] if guesser else leads
    _check_guests(spec, answering, guests)
    return answering, guests


def _check_guests(spec: EngineSpec, answering: Sequence[Model], guests: Sequence[Model]) -> None:
    where = f"engines.{spec.name}.leads"
    first = answering[0].card
    for model in guests:
        if model.card is None or model.adapter is not None:
            raise PoolError(f"{where}: {model.name!r} is no model with a checkpoint of its own")
        assert first is not None, "members have checkpoints"
        if not _same_vocabulary(model.card, first):
            raise PoolError(f"{where}: {model.name!r} has another vocabulary than the members")
    if guests:
        check_one_shape(spec, guests)


def _guesser(spec: EngineSpec, options: StackedOptions, models: Sequence[Model]) -> Model | None:
    """Return the model that only guesses, as its shape is not the others'; None: all answer."""
    if not isinstance(options.draft, DraftingMember):
        return None
    wanted, where = options.draft.member, f"engines.{spec.name}.options.draft.member"
    cards = {model.name: model.card for model in models if model.card and model.adapter is None}
    others = [card for name, card in cards.items() if name != wanted]
    if wanted not in cards or not others:
        raise PoolError(
            f"{where}: {wanted!r} is not one of several models of this engine; allowed are "
            f"{', '.join(cards)}"
        )
    card, first = cards[wanted], others[0]
    if not _same_vocabulary(card, first):
        raise PoolError(f"{where}: {wanted!r} has another vocabulary than the models it drafts for")
    return None if card.shape == first.shape else next(m for m in models if m.name == wanted)


def _same_vocabulary(one: ModelCard, other: ModelCard) -> bool:
    same = one.tokenizer_sha256 == other.tokenizer_sha256
    return same and one.shape.vocab_size == other.shape.vocab_size


def _create(spec: EngineSpec, options: StackedOptions, models: Sequence[Model]) -> Engine:
    from models.engines.stacked.engine import StackedEngine  # noqa: PLC0415 - loads torch

    answering, guests = _split(spec, options, models)

    def cards(of: Sequence[Model]) -> dict[str, ModelCard]:
        known = {model.name: model.card for model in of if model.card is not None}
        most = options.context_tokens or sys.maxsize
        return {
            name: replace(card, context_tokens=min(card.context_tokens, most))
            for name, card in known.items()
        }

    traits = _traits(spec, options, answering, guests)
    return StackedEngine(spec, cards(answering), traits, options, cards(guests))


KIND = EngineKind(
    options=StackedOptions,
    inspect=_inspect,
    create=_create,
    formats=("safetensors",),
    dtypes=("auto", "float32", "bfloat16", "float16", "int8", "int4"),
    adapters=True,
    leads=True,
    beside_answers=frozenset(
        {
            *("step_rows", "stream_interval_ms", "num_threads"),
            *("step_timeout_s", "prefix_cache", "max_adapters"),
        }
    ),
)
