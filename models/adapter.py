"""A low-rank adapter of a checkpoint (LoRA, Hu et al. 2022) as PEFT writes it: what its files say.

A module of the base computes x·Wᵀ; with the adapter x·Wᵀ + scale · (x·Aᵀ)·Bᵀ, where A is [rank, in]
and B [out, rank]. Everything is held against the base before anybody serves it, and what PEFT
computes beyond this is refused by name instead of being left out. No tensor library is needed.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import PoolError
from models.sources.safetensors import StoredTensor, read_header, read_json, read_tensors

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX, _SHRINK, _EXPAND = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_LAYERS = "model.layers."
_PLAIN_TYPES = ("F32", "F16", "BF16")
_MOST = 2.0**31  # of what a product is multiplied by, so that it stays one

# What is read of the configuration; what is allowed where only some values compute the above; and
# what concerned training alone. Any other key must be empty, as it would change the result.
_READ = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern"),
}
_ALLOWED: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # The others start from another base than the one that is served.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
_OF_TRAINING = {
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("peft_version", "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "ensure_weight_tying"),
}


@dataclass(frozen=True, kw_only=True)
class AdapterSource:
    """Where an adapter is (see `sources.locate`), and the hash of what its files hold there."""

    source: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a folder of PEFT's says. `scales` is what each module's product is multiplied by."""

    path: Path
    origin: AdapterSource
    scales: Mapping[str, float]
    largest_rank: int
    parameters: int
    base_name: str | None  # as its makers called the base


def read_adapter(path: Path, base: Path | None, *, source: str | None = None) -> Adapter:
    """Read an adapter and hold its tensors against those of the checkpoint folder `base`.

    Without `base` only the adapter's own files are held against each other. Raises `PoolError` that
    names the file, the key or tensor, its value or shape, and what is allowed.
    """
    config, weights = path / ADAPTER_CONFIG, path / ADAPTER_WEIGHTS
    if not path.is_dir() or not config.is_file():
        raise PoolError(f"{path} is no adapter: there is no {config}")
    if not weights.is_file():
        raise PoolError(f"{weights} is missing; adapters are read from safetensors alone")
    facts = read_json(config)
    _check_config(config, facts)
    stored = read_header(weights)
    modules = _modules(weights, stored)
    ranks, scales = {}, {}
    for module in modules:
        ranks[module], scales[module] = _rank_and_scale(config, facts, module)
        _check_shapes(config, stored, module, ranks[module])
    if base is not None:
        _check_base(config, facts, stored, modules, read_tensors(base))
    digest = hashlib.sha256(config.read_bytes())
    with weights.open("rb") as stream:
        digest.update(hashlib.file_digest(stream, "sha256").digest())
    return Adapter(
        path=path,
        origin=AdapterSource(source=source or str(path), sha256=digest.hexdigest()),
        scales=scales,
        largest_rank=max(ranks.values()),
        parameters=sum(math.prod(tensor.shape) for tensor in stored.values()),
        base_name=facts.get("base_model_name_or_path"),
    )


def factor_names(module: str) -> tuple[str, str]:
    """Return how the file names the factors A and B of a module."""
    return f"{_PREFIX}{module}{_SHRINK}", f"{_PREFIX}{module}{_EXPAND}"


def _check_config(file: Path, facts: Mapping[str, Any]) -> None:
    for key, value in facts.items():
        if key in _ALLOWED:
            if value not in _ALLOWED[key]:
                allowed = ", ".join(map(repr, _ALLOWED[key]))
                raise PoolError(f"{file}: {key} {value!r} is not supported; allowed are {allowed}")
        elif key not in _READ | _OF_TRAINING and value not in (None, False, [], {}, ""):
            raise PoolError(f"{file}: {key} {value!r} is not supported; leave it out")


def _modules(file: Path, stored: Mapping[str, StoredTensor]) -> list[str]:
    """Return the modules that have a pair of factors; refuse every tensor of another kind."""
    modules: dict[str, None] = {}
    for name, tensor in stored.items():
        module = name.removeprefix(_PREFIX).removesuffix(_SHRINK).removesuffix(_EXPAND)
        if name not in factor_names(module):
            raise PoolError(
                f"{file}: the tensor {name} is not supported; allowed are pairs of "
                f"{_PREFIX}MODULE{_SHRINK} and {_EXPAND}"
            )
        for wanted in factor_names(module):
            if wanted not in stored:
                raise PoolError(f"{file}: the tensor {wanted} is missing, which {name} needs")
        if tensor.dtype not in _PLAIN_TYPES:
            raise PoolError(
                f"{file}: the tensor {name} is of type {tensor.dtype}; allowed are "
                f"{', '.join(_PLAIN_TYPES)}"
            )
        modules[module] = None
    if not modules:
        raise PoolError(f"{file} holds no tensors")
    return list(modules)


def _rank_and_scale(file: Path, facts: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Return the rank and scale of a module; patterns are regular expressions of its name's end."""
    rank = _by_pattern(file, facts, "rank_pattern", module, facts.get("r", 8))
    alpha = _by_pattern(file, facts, "alpha_pattern", module, facts.get("lora_alpha", 8))
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise PoolError(f"{file}: the rank {rank!r} of {module} is not allowed; one above 0 is")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= _MOST:
        raise PoolError(f"{file}: lora_alpha {alpha!r} of {module} is not allowed; a number is")
    return rank, alpha / (math.sqrt(rank) if facts.get("use_rslora") else rank)


def _by_pattern(
    file: Path, facts: Mapping[str, Any], key: str, module: str, otherwise: object
) -> object:
    patterns = facts.get(key) or {}
    if not isinstance(patterns, dict):
        raise PoolError(f"{file}: {key} {patterns!r} is not allowed; a mapping is")
    for pattern, value in patterns.items():
        if _match(file, key, rf"(.*\.)?({pattern})", module):
            return value
    return otherwise


def _match(file: Path, key: str, pattern: str, module: str) -> re.Match[str] | None:
    try:
        return re.fullmatch(pattern, module)
    except re.error as error:
        raise PoolError(f"{file}: {key} {pattern!r} is no regular expression: {error}") from None


def _check_shapes(file: Path, stored: Mapping[str, StoredTensor], module: str, rank: int) -> None:
    for name, axis in zip(factor_names(module), (0, 1), strict=True):
        shape = stored[name].shape
        if len(shape) != 2 or shape[axis] != rank:
            raise PoolError(
                f"{stored[name].file}: the tensor {name} has the shape {list(shape)}, but "
                f"{file.name} gives {module} the rank {rank}"
            )


def _check_base(
    file: Path,
    facts: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    modules: Iterable[str],
    base: Mapping[str, StoredTensor],
) -> None:
    """Refuse factors of other shapes than the base's matrices, and others than are targeted."""
    linear = {
        name.removesuffix(".weight"): tensor.shape
        for name, tensor in base.items()
        if name.startswith(_LAYERS) and len(tensor.shape) == 2
    }
    targeted = [module for module in linear if _is_targeted(file, facts, module)]
    for module in modules:
        shrink, expand = (stored[name] for name in factor_names(module))
        if module not in linear:
            raise PoolError(
                f"{shrink.file}: {module} is adapted, which is no matrix of a layer of the base; "
                f"allowed are {', '.join(sorted({name.split('.', 3)[3] for name in linear}))}"
            )
        if module not in targeted:
            raise PoolError(
                f"{shrink.file}: {module} is adapted, but is none of {file.name}'s target_modules "
                f"{facts.get('target_modules')!r}"
            )
        if (*expand.shape[:1], *shrink.shape[1:]) != linear[module]:
            raise PoolError(
                f"{shrink.file}: the factors of {module} make a matrix of "
                f"{[expand.shape[0], shrink.shape[1]]}, but the base's is {list(linear[module])}; "
                "is it another base's adapter?"
            )
    for module in targeted:
        if factor_names(module)[0] not in stored:
            raise PoolError(
                f"{file.parent / ADAPTER_WEIGHTS}: the tensor {factor_names(module)[0]} is "
                f"missing, which {file.name}'s target_modules {facts['target_modules']!r} ask for"
            )


def _is_targeted(file: Path, facts: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT adapts the module: its `check_target_module_exists`."""
    if _is_named(file, facts, "exclude_modules", module):
        return False
    targets, only = facts.get("target_modules"), facts.get("layers_to_transform")
    if targets == "all-linear":
        return True
    if not _is_named(file, facts, "target_modules", module):
        return False
    if isinstance(targets, str) or only is None or only == []:
        return True
    layers = only if isinstance(only, list) else [only]
    if not all(type(layer) is int for layer in layers):
        raise PoolError(
            f"{file}: layers_to_transform {only!r} is not allowed; a layer's number or a list is"
        )
    given = facts.get("layers_pattern") or r"[^.]*"
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, list) or not all(isinstance(one, str) for one in patterns):
        raise PoolError(
            f"{file}: layers_pattern {given!r} is not allowed; a regular expression or a list is"
        )
    for pattern in patterns:
        whole = rf"(?:^|.*?\.){pattern}\.(?P<layer>\d+)\..*"
        found = _match(file, "layers_pattern", whole, module)
        if found is not None:
            return int(found["layer"]) in layers
    return False


def _is_named(file: Path, facts: Mapping[str, Any], key: str, module: str) -> bool:
    """Whether a regular expression, or a list of names or of their ends, has the module."""
    named = facts.get(key)
    if named is None:
        return False
    if isinstance(named, str):
        return _match(file, key, named, module) is not None
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise PoolError(
            f"{file}: {key} {named!r} is not allowed; a list of modules or a regular expression is"
        )
    return any(module == name or module.endswith(f".{name}") for name in named)
