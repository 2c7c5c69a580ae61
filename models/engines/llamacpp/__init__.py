"""The llamacpp engine: any GGUF file through llama.cpp, by the binding xllamacpp.

    `engine` admits (`admission`) → `translate` writes the request → `binding` runs it in one of
    llama.cpp's slots → `translate` reads each token → the event loop

llama.cpp batches what runs, keeps prompts that it has read and constrains answers to grammars; what
the answers say, stop strings, the queue and fairness are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from pydantic import BaseModel, ConfigDict, Field

from models.card import ModelCard
from models.engines.base import Engine
from models.engines.kind import EngineKind, EngineTraits, formats_of
from models.errors import PoolError
from models.spec import EngineSpec, Model

_INSTALL = "it needs xllamacpp, which is not installed here: pip install 'shoal[llamacpp]'"

REFUSES = frozenset({"min_tokens", "echo"})

_LEAST_CONTEXT_TOKENS = 2048

# A cached token has a key and a value per layer, in half precision.
_BYTES_PER_NUMBER = 2


class LlamacppOptions(BaseModel):
    """How llama.cpp runs.

    Up to `num_slots` requests run at once, in one batch. Each slot has a cache of its own for
    `context_tokens`, so that an answer never depends on what runs beside it; None: the model's
    context, or less, down to 2,048, where else not all slots fitted into the engine's
    `kv_memory_bytes`. There are as many slots as fit. A prompt is read `step_tokens` at a time:
    more makes prompts faster, and lets others' tokens and a cancellation wait longer. Prompts that
    no slot holds any more stay in memory, up to `prompt_cache_mib` (0: none do).

    `num_threads` compute; None: one per core that this process may use. Where they wait for each
    other they sleep, so that engines may share cores: the operating system gives each engine what
    the others leave. With `polling` they spin, as llama.cpp comes, which nearly doubles the
    speed where every thread has a core of its own, and costs most of it where it has not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_slots: int = Field(8, ge=1, le=256)
    context_tokens: int | None = Field(None, ge=1)
    step_tokens: int = Field(128, ge=32)
    prompt_cache_mib: int = Field(256, ge=0)
    num_threads: int | None = Field(None, ge=1)
    polling: bool = False


def slots(spec: EngineSpec, options: LlamacppOptions, card: ModelCard) -> tuple[int, int]:
    """Return how many slots there are, and how many tokens each has room for.

    Where not even one slot of the wanted size fits, there is one that is as large as the memory.
    """
    shape = card.shape
    row_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * _BYTES_PER_NUMBER
    num_rows = spec.kv_memory_bytes // row_bytes
    wanted = options.context_tokens or max(num_rows // options.num_slots, _LEAST_CONTEXT_TOKENS)
    context_tokens = min(wanted, card.context_tokens, num_rows)
    return min(options.num_slots, num_rows // max(context_tokens, 1)), context_tokens


def _inspect(spec: EngineSpec, options: LlamacppOptions, models: Sequence[Model]) -> EngineTraits:
    card = _the_card(spec, models)
    num_slots, context_tokens = slots(spec, options, card)
    if num_slots == 0:
        raise PoolError(
            f"engines.{spec.name}.kv_memory_bytes: {spec.kv_memory_bytes} holds not one token"
        )
    return EngineTraits(
        fuses=False,
        updates_evidence=False,
        refuses=REFUSES,
        formats=formats_of(models),
        context_tokens=context_tokens,
        needs=None if find_spec("xllamacpp") else _INSTALL,
    )


def _create(spec: EngineSpec, options: LlamacppOptions, models: Sequence[Model]) -> Engine:
    from models.engines.llamacpp.engine import LlamacppEngine  # noqa: PLC0415 - loads llguidance

    card = _the_card(spec, models)
    return LlamacppEngine(spec, options, models[0].name, card, _inspect(spec, options, models))


def _the_card(spec: EngineSpec, models: Sequence[Model]) -> ModelCard:
    if len(models) != 1:
        raise PoolError(
            f"engines.{spec.name}: a llamacpp engine runs one model, not {len(models)}; give each "
            "an engine of its own"
        )
    card = models[0].card
    assert card is not None, "the registry refuses models without one"
    return card


KIND = EngineKind(
    options=LlamacppOptions, inspect=_inspect, create=_create, formats=("gguf",), dtypes=("auto",)
)  # as its file has them
