"""What differs from layer to layer: how far it sees back, and how it encodes positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.card import read_count
from models.errors import PoolError
from models.families import Family, Scaling

_BOUNDED = ("llama3", "yarn")  # these start from the context that the model was made with
_NEEDED: Mapping[Scaling, tuple[str, ...]] = {
    "longrope": ("factor",),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
_OPTIONAL: Mapping[Scaling, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    "longrope": ("attention_factor",),
}
_MOST = 2.0**64  # of a number, as of one's reciprocal: single precision computes with it
_KINDS = _FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """The rotary embedding of each head's first `dims`: its base, and how its frequencies are
    scaled (see `model.frequencies`).

    `factors` are the scaling's own numbers by the names of config.json; longrope divides each
    frequency by its own, one of `short` or one of `long`.
    """

    dims: int
    theta: float
    scaling: Scaling = "default"
    original_context_tokens: int
    truncate: bool = True
    factors: tuple[tuple[str, float], ...] = ()
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """One layer: it sees the last `window_tokens`, its own one included, or all (None).

    Without a `rotary` embedding it does not know positions.
    """

    window_tokens: int | None
    rotary: Rotary | None


def read_layers(
    file: Path, config: Mapping[str, Any], family: Family, head_dim: int
) -> tuple[LayerKind, ...]:
    """Read every layer's kind from `config`, which is `file`; raises `PoolError`."""
    num_layers = read_count(file, config, "num_hidden_layers")
    rotates = _rotating(file, config, family, num_layers)
    windowed = _windowed(file, config, family, rotates)
    window_tokens = None
    if any(windowed):
        if config.get("sliding_window") is None:
            raise PoolError(f"{file}: layer_types has {_SLIDING}, but sliding_window is null")
        if "use_sliding_window" in family.defaults and not read_flag(
            file, config, "use_sliding_window"
        ):
            raise PoolError(f"{file}: layer_types has {_SLIDING}, but use_sliding_window is false")
        window_tokens = read_count(file, config, "sliding_window")
        if window_tokens >= read_count(file, config, "max_position_embeddings"):
            window_tokens = None  # no sequence outgrows it
    full, local = _rotaries(file, config, family, head_dim)
    return tuple(
        LayerKind(
            window_tokens=window_tokens if narrow else None,
            rotary=(local if narrow else full) if turns else None,
        )
        for narrow, turns in zip(windowed, rotates, strict=True)
    )


def _rotating(file: Path, config: Mapping[str, Any], family: Family, num_layers: int) -> list[bool]:
    """Which layers have a rotary embedding (SmolLM3 leaves every fourth without)."""
    if "no_rope_layers" not in family.defaults:
        return [True] * num_layers
    given = config["no_rope_layers"]  # 1 where there is one, whatever the name says
    if given is None:
        interval = read_count(file, config, "no_rope_layer_interval")
        return [(index + 1) % interval != 0 for index in range(num_layers)]
    if not isinstance(given, list) or len(given) != num_layers:
        raise PoolError(f"{file}: no_rope_layers {given!r} must have one number for each layer")
    return [bool(turns) for turns in given]


def _windowed(
    file: Path, config: Mapping[str, Any], family: Family, rotates: list[bool]
) -> list[bool]:
    """Which layers see only a window."""
    known, num_layers = family.defaults, len(rotates)
    types = config.get("layer_types")
    if types is not None and "layer_types" not in known:
        if not isinstance(types, list) or any(kind != _FULL for kind in types):
            raise PoolError(
                f"{file}: layer_types {types!r} is not supported for {config['model_type']}; "
                f"allowed is {_FULL}"
            )
        types = None
    if "sliding_window" not in known:
        return [False] * num_layers
    if types is not None:
        known_types = isinstance(types, list) and all(kind in _KINDS for kind in types)
        if not known_types or len(types) != num_layers:
            raise PoolError(
                f"{file}: layer_types {types!r} must have one of {_FULL}, {_SLIDING} for each of "
                f"the {num_layers} layers"
            )
        return [kind == _SLIDING for kind in types]
    if "sliding_window_pattern" in known:
        pattern = read_count(file, config, "sliding_window_pattern")
        return [(index + 1) % pattern != 0 for index in range(num_layers)]
    if "use_sliding_window" not in known:
        return [config["sliding_window"] is not None] * num_layers
    if not read_flag(file, config, "use_sliding_window") or config["sliding_window"] is None:
        return [False] * num_layers
    if "no_rope_layers" in known:
        return [not turns for turns in rotates]
    first = config["max_window_layers"]
    if type(first) is not int:
        raise PoolError(f"{file}: max_window_layers {first!r} is not allowed; a whole number is")
    return [index >= first for index in range(num_layers)]


def _rotaries(
    file: Path, config: Mapping[str, Any], family: Family, head_dim: int
) -> tuple[Rotary, Rotary]:
    """Return the rotary embeddings of layers that see all, and of those that see a window.

    Either spelling is read as transformers 5 does: `rope_scaling` first, else `rope_parameters`;
    where the two kinds of layers differ (Gemma 3), the second is a mapping of both.
    """
    legacy, rope = config.get("rope_scaling") or {}, config.get("rope_parameters") or {}
    full, sliding = (rope.get(kind) or {} if isinstance(rope, dict) else {} for kind in _KINDS)
    for found in (legacy, rope, full, sliding):
        if not isinstance(found, dict):
            raise PoolError(f"{file}: the rotary parameters {found!r} are not a mapping")
    if "rope_local_base_freq" not in family.defaults:
        rotary = _read_rotary(file, legacy or rope, config, family, head_dim)
        return rotary, rotary
    if rope.keys() - {*_KINDS}:
        raise PoolError(f"{file}: rope_parameters {rope!r} must map {_FULL} and {_SLIDING}")
    return (
        _read_rotary(file, {**full, **legacy}, config, family, head_dim),
        _read_rotary(
            file,
            sliding,
            {**config, "rope_theta": config["rope_local_base_freq"]},
            family,
            head_dim,
        ),
    )


def _read_rotary(
    file: Path,
    rope: Mapping[str, Any],
    config: Mapping[str, Any],
    family: Family,
    head_dim: int,
) -> Rotary:
    kind: Scaling = rope.get("rope_type", rope.get("type", "default"))
    if kind not in family.scalings:
        raise PoolError(
            f"{file}: rope_type {kind!r} is not supported by the stacked engine; "
            f"allowed are {', '.join(family.scalings)}"
        )
    dims = _rotated_dims(file, rope, config, family, head_dim)
    context_tokens = read_count(file, config, "max_position_embeddings")
    if kind in _BOUNDED:
        if "original_max_position_embeddings" in config:
            raise PoolError(
                f"{file}: original_max_position_embeddings belongs within rope_parameters"
            )
        if rope.get("original_max_position_embeddings") is not None:
            context_tokens = read_count(file, rope, "original_max_position_embeddings")
    if kind == "yarn" and "factor" in rope and rope["factor"] is None:
        rope = {**rope, "factor": config["max_position_embeddings"] / context_tokens}
    if kind == "longrope":
        original_tokens = read_count(file, config, "original_max_position_embeddings")
        if rope.get("factor") is None:
            rope = {**rope, "factor": context_tokens / original_tokens}
        context_tokens = original_tokens
    given = _NEEDED.get(kind, ())
    given += tuple(key for key in _OPTIONAL.get(kind, ()) if rope.get(key) is not None)
    factors = {key: read_number(file, rope, key) for key in given}
    if kind == "llama3" and factors["high_freq_factor"] <= factors["low_freq_factor"]:
        raise PoolError(
            f"{file}: high_freq_factor {rope['high_freq_factor']!r} is not allowed; one above "
            f"low_freq_factor {rope['low_freq_factor']!r} is"
        )
    theta = read_number(file, rope if "rope_theta" in rope else config, "rope_theta")
    if kind == "yarn" and theta <= 1:
        raise PoolError(f"{file}: rope_theta {theta!r} is not allowed with yarn; one above 1 is")
    if kind == "longrope" and context_tokens == 1:
        raise PoolError(
            f"{file}: original_max_position_embeddings 1 is not allowed with longrope; more is"
        )
    return Rotary(
        dims=dims,
        theta=theta,
        scaling=kind,
        original_context_tokens=context_tokens,
        truncate=read_flag(file, {"truncate": True, **rope}, "truncate"),
        factors=tuple(factors.items()),
        short=_divisors(file, rope, "short_factor", dims) if kind == "longrope" else (),
        long=_divisors(file, rope, "long_factor", dims) if kind == "longrope" else (),
    )


def _rotated_dims(
    file: Path, rope: Mapping[str, Any], config: Mapping[str, Any], family: Family, head_dim: int
) -> int:
    """How many of a head's dimensions are rotated, from the first."""
    key = "partial_rotary_factor"
    share = next((found[key] for found in (rope, config) if found.get(key) is not None), 1.0)
    known = isinstance(share, int | float) and (share == 1 or (family.partly_rotated and share < 1))
    dims = int(head_dim * share) if known else 0
    if dims < 2 or dims % 2:
        allowed = "1.0, or less that rotates pairs," if family.partly_rotated else "1.0"
        raise PoolError(
            f"{file}: {key} {share!r} is not supported by the stacked engine for "
            f"{config['model_type']}; allowed is {allowed}"
        )
    return dims


def _divisors(file: Path, rope: Mapping[str, Any], key: str, dims: int) -> tuple[float, ...]:
    """Read what longrope divides each pair's frequency by."""
    values = rope.get(key)
    if not isinstance(values, list) or len(values) != dims // 2:
        raise PoolError(f"{file}: {key} must be a list of {dims // 2} numbers")
    return tuple(read_number(file, {key: value}, key) for value in values)


def read_number(file: Path, config: Mapping[str, Any], key: str) -> float:
    """Return the number above 0 at `key` of `file`; raises `PoolError`."""
    value: Any = config.get(key)
    if type(value) in (int, float) and 1 / _MOST <= value <= _MOST:
        return float(value)
    raise PoolError(
        f"{file}: {key} {value!r} is not allowed; a number above 0 is, from 2^-64 to 2^64"
    )


def read_flag(file: Path, config: Mapping[str, Any], key: str) -> bool:
    """Return what is true or false at `key` of `file`; raises `PoolError`."""
    value = config[key]
    if not isinstance(value, bool):
        raise PoolError(f"{file}: {key} {value!r} is not allowed; true or false is")
    return value
