"""The llamacpp engine: any GGUF file through llama.cpp, by the binding xllamacpp.

    `engine` admits → `translate` writes the request → `binding` runs it in one of
    llama.cpp's slots → `translate` reads each token → the event loop

llama.cpp batches what runs, keeps prompts that it has read and constrains answers to grammars; what
the answers say, stop strings, the queue and fairness are ours. Of a prompt it tells no likelihoods:
where they are asked for, the prompt's tokens are forced on it as if it wrote them
(`translate.score`). A file of an encoder, which says how its token vectors become one, tells
vectors or scores instead (`encoder`).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, TypeAlias

from pydantic import Field

from models.card import ModelCard
from models.engines.base import Engine
from models.engines.kind import EngineKind, EngineTraits, formats_of, only_card
from models.errors import PoolError
from models.sources.gguf import read_gguf
from models.spec import EngineSpec, Model
from policies.kinds import Strict

Pooling: TypeAlias = Literal["mean", "cls", "last", "rank"]
_POOLINGS: dict[int, Pooling] = {1: "mean", 2: "cls", 3: "last", 4: "rank"}  # llama.cpp's numbers

_INSTALL = "it needs xllamacpp, which is not installed here: pip install 'shoal[llamacpp]'"

REFUSES = frozenset({"min_tokens"})

_LEAST_CONTEXT_TOKENS = 2048

# A cached token has a key and a value per layer, in half precision.
_BYTES_PER_NUMBER = 2


class LlamacppOptions(Strict):
    """How llama.cpp runs.

    Up to `num_slots` requests run at once, in one batch. Each slot has a cache of its own for
    `context_tokens`, so that an answer never depends on what runs beside it; None: the model's
    context, or less, down to 2,048, where else not all slots fitted into the engine's
    `kv_memory_bytes`. There are as many slots as fit. A prompt is read `step_tokens` at a time:
    more makes prompts faster, and lets others' tokens and a cancellation wait longer. Prompts that
    no slot holds any more stay in memory, up to `prompt_cache_mib` (0: none do).

    A file is an encoder's where it says how vectors are pooled, or `pooling` does: then it writes
    no answers.

    `num_threads` compute; None: one per core that this process may use. Where they wait for each
    other they sleep, so that engines may share cores: the operating system gives each engine what
    the others leave. With `polling` they spin, as llama.cpp comes, which nearly doubles the
    speed where every thread has a core of its own, and costs most of it where it has not.
    """

    num_slots: int = Field(8, ge=1, le=256)
    context_tokens: int | None = Field(None, ge=1)
    step_tokens: int = Field(128, ge=32)
    prompt_cache_mib: int = Field(256, ge=0)
    pooling: Pooling | None = None
    num_threads: int | None = Field(None, ge=1)
    polling: bool = False


def pooling_of(options: LlamacppOptions, card: ModelCard) -> Pooling | None:
    """Return how the file's token vectors become what is told of a text; None if it writes."""
    return options.pooling or _POOLINGS.get(read_gguf(card.path).value("pooling_type", 0))


def slots(spec: EngineSpec, options: LlamacppOptions, card: ModelCard) -> tuple[int, int]:
    """Return how many slots there are, and how many tokens each has room for.

    Where not even one slot of the wanted size fits, there is one that is as large as the memory.
    """
    shape = card.shape
    row_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * _BYTES_PER_NUMBER
    num_rows = spec.kv_memory_bytes // max(row_bytes, 1)  # state-space models keep none
    wanted = options.context_tokens or max(num_rows // options.num_slots, _LEAST_CONTEXT_TOKENS)
    context_tokens = min(wanted, card.context_tokens, num_rows)
    return min(options.num_slots, num_rows // max(context_tokens, 1)), context_tokens


def _inspect(spec: EngineSpec, options: LlamacppOptions, models: Sequence[Model]) -> EngineTraits:
    card = only_card(spec, models)
    num_slots, context_tokens = slots(spec, options, card)
    if num_slots == 0:
        raise PoolError(
            f"engines.{spec.name}.kv_memory_bytes: {spec.kv_memory_bytes} holds not one token"
        )
    pooling = pooling_of(options, card)
    if pooling is not None:
        return EngineTraits(
            fuses=False,
            logprobs=False,
            structures=(),
            encodes={models[0].name: ("score",) if pooling == "rank" else ("vector", "score")},
            context_tokens=context_tokens,
            needs=None if find_spec("xllamacpp") else _INSTALL,
        )
    return EngineTraits(
        fuses=False,
        updates_evidence=False,
        reads=False,
        refuses=REFUSES,
        formats=formats_of(models),
        context_tokens=context_tokens,
        needs=None if find_spec("xllamacpp") else _INSTALL,
    )


def _create(spec: EngineSpec, options: LlamacppOptions, models: Sequence[Model]) -> Engine:
    card, name = only_card(spec, models), models[0].name
    traits = _inspect(spec, options, models)
    if name in traits.encodes:
        from models.engines.llamacpp.encoder import encoder_engine  # noqa: PLC0415 - where used

        return encoder_engine(spec, options, name, card, traits.encodes[name])
    from models.engines.llamacpp.engine import LlamacppEngine  # noqa: PLC0415 - loads llguidance

    return LlamacppEngine(spec, options, name, card, traits)


KIND = EngineKind(
    options=LlamacppOptions,
    inspect=_inspect,
    create=_create,
    formats=("gguf",),
    dtypes=("auto",),  # as its file has them
    beside_answers=frozenset({"step_tokens", "prompt_cache_mib", "num_threads", "polling"}),
)
