"""Architectures that can be cut: names of their parts, their limits, and the shape of a chunk.

Llama, Mistral, Qwen2 and Qwen3 in transformers share one layout: `model.embed_tokens`, `layers`
of `self_attn.{q,k,v,o}_proj` and `mlp.{gate,up,down}_proj` between RMS norms, `model.norm` and
`lm_head`. They differ in biases, in Qwen3's norms of each head, and in what their configs allow.

What is left open of a chunk's shape is chosen, the feed-forward width is solved. Between shapes of
equal size, the one nearest to the base's proportions wins. Width and depth weigh alike: cutting
width recovers better in large models (Muralidharan et al. 2024, Minitron), cutting depth did in the
small one that ships, so neither is favoured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from models.card import SUPPORTED_ARCHITECTURES
from models.downscale.recipe import MemberShape
from models.errors import BaseError


@dataclass(frozen=True, kw_only=True)
class CutShape:
    """The shape of a checkpoint; sizes in elements, the same in every layer."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    head_dim: int


def check_architecture(config: PretrainedConfig) -> None:
    """Raise `BaseError` if a checkpoint with `config` cannot be cut here, saying why."""
    if config.model_type not in SUPPORTED_ARCHITECTURES:
        raise BaseError(
            f"model_type {config.model_type!r} is not supported; "
            f"allowed are {', '.join(SUPPORTED_ARCHITECTURES)}"
        )


def shape_of(config: PretrainedConfig) -> CutShape:
    """Return the shape that `config` describes."""
    num_heads = int(config.num_attention_heads)
    return CutShape(
        hidden_size=int(config.hidden_size),
        num_layers=int(config.num_hidden_layers),
        num_heads=num_heads,
        num_kv_heads=int(config.num_key_value_heads or num_heads),
        intermediate_size=int(config.intermediate_size),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // num_heads),
    )


def check_shape(config: PretrainedConfig, shape: CutShape) -> None:
    """Raise `BaseError` if `shape` cannot be cut from `config`, or would not load afterwards."""
    base = shape_of(config)
    for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size"):
        wanted, most = getattr(shape, name), getattr(base, name)
        if not 1 <= wanted <= most:
            raise BaseError(f"{name}: {wanted} is not within 1 and the base's {most}")
    if shape.num_heads % shape.num_kv_heads:
        raise BaseError(
            f"num_heads: {shape.num_heads} is no multiple of num_kv_heads {shape.num_kv_heads}"
        )
    if shape.num_heads // shape.num_kv_heads > base.num_heads // base.num_kv_heads:
        raise BaseError(
            f"num_heads: {shape.num_heads} over {shape.num_kv_heads} key/value heads are more per "
            f"group than the base's {base.num_heads // base.num_kv_heads}"
        )
    if config.model_type == "llama" and shape.hidden_size % shape.num_heads:
        raise BaseError(
            f"hidden_size: {shape.hidden_size} is no multiple of num_heads {shape.num_heads}, "
            "which Llama's config requires"
        )
    if config.model_type == "qwen2" and shape.hidden_size != shape.num_heads * shape.head_dim:
        raise BaseError(
            f"hidden_size: {shape.hidden_size} is not num_heads {shape.num_heads} times the head "
            f"size {shape.head_dim}; Qwen2 has no head_dim of its own (vLLM ignores it)"
        )


def cut_config(config: PretrainedConfig, shape: CutShape, *, eps_scale: float) -> PretrainedConfig:
    """Return a copy of `config` for a checkpoint of `shape`, with the norms' epsilon scaled."""
    facts: dict[str, Any] = config.to_dict()
    facts |= {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "intermediate_size": shape.intermediate_size,
        "rms_norm_eps": float(config.rms_norm_eps) * eps_scale,
    }
    if config.model_type != "qwen2":
        facts["head_dim"] = shape.head_dim
    if facts.get("max_window_layers") is not None:
        facts["max_window_layers"] = min(facts["max_window_layers"], shape.num_layers)
    if facts.get("layer_types"):
        facts["layer_types"] = facts["layer_types"][: shape.num_layers]
    return type(config).from_dict(facts)


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers."""
    return list(model.get_submodule("model.layers").children())


def count_parameters(config: PretrainedConfig, shape: CutShape) -> int:
    """Return the parameters that a checkpoint like `config`, of `shape`, would have."""
    hidden, ff = shape.hidden_size, shape.intermediate_size
    heads, kv = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = 2 * hidden * heads + 2 * hidden * kv
    is_qwen2 = config.model_type == "qwen2"
    if is_qwen2 or getattr(config, "attention_bias", False):
        attention += heads + 2 * kv + (0 if is_qwen2 else hidden)
    if config.model_type == "qwen3":
        attention += 2 * shape.head_dim
    mlp = 3 * hidden * ff + ((2 * ff + hidden) if getattr(config, "mlp_bias", False) else 0)
    embeddings = int(config.vocab_size) * hidden * (1 if config.tie_word_embeddings else 2)
    return shape.num_layers * (attention + mlp + 2 * hidden) + embeddings + hidden


TOLERANCE: Final = 0.02
# Widths that are multiples of the largest of these that still hits the target.
_MULTIPLES: Final = (64, 32, 16, 8, 4, 2, 1)


def solve_shape(config: PretrainedConfig, parameters: int, wish: MemberShape) -> CutShape:
    """Return the shape of a chunk of `parameters`, within 2%, that honours `wish`.

    Raises:
        BaseError: no such shape exists; names the nearest sizes, or the wish that cannot be met.
    """
    base = shape_of(config)
    best: tuple[float, CutShape] | None = None
    refused: BaseError | None = None
    for candidate in _candidates(config, base, wish):
        try:
            check_shape(config, candidate)
        except BaseError as error:
            refused = error
            continue
        solved = _with_feed_forward(config, candidate, parameters)
        if solved is None:
            continue
        distance = _distance(base, solved)
        if best is None or distance < best[0]:
            best = distance, solved
    if best is not None:
        return best[1]
    reason = f" ({refused})" if refused else ""
    raise BaseError(
        f"no shape of {parameters} parameters (± {TOLERANCE:.0%}) can be cut from the base's "
        f"{count_parameters(config, base)} with the wished shape {wish.model_dump()}{reason}; "
        "change members.parameters or members.shape"
    )


def _candidates(config: PretrainedConfig, base: CutShape, wish: MemberShape) -> Iterator[CutShape]:
    """Shapes with the base's feed-forward width, of all depths, heads and hidden sizes."""
    groups = range(1, base.num_kv_heads + 1)
    per_group = base.num_heads // base.num_kv_heads
    for num_layers in _wished(wish.num_layers, range(1, base.num_layers + 1)):
        for num_kv_heads in _wished(wish.num_kv_heads, groups):
            multiples = [num_kv_heads * n for n in range(1, per_group + 1)]
            for num_heads in _wished(wish.num_heads, multiples):
                for hidden_size in _wished(wish.hidden_size, _widths(config, base, num_heads)):
                    yield replace(
                        base,
                        hidden_size=hidden_size,
                        num_layers=num_layers,
                        num_heads=num_heads,
                        num_kv_heads=num_kv_heads,
                    )


def _wished(wish: int | None, otherwise: range | list[int]) -> range | list[int]:
    return otherwise if wish is None else [wish]


def _widths(config: PretrainedConfig, base: CutShape, num_heads: int) -> list[int]:
    """Hidden sizes to go with `num_heads`: sixteenths of the base's, multiples of `num_heads`."""
    if config.model_type == "qwen2":
        return [num_heads * base.head_dim]
    step = math.lcm(num_heads, min(max(8, base.hidden_size // 16), base.hidden_size))
    sixteenths = (base.hidden_size * k / 16 / step for k in range(1, 17))
    return sorted({max(1, round(exact)) * step for exact in sixteenths})


def _with_feed_forward(
    config: PretrainedConfig, shape: CutShape, parameters: int
) -> CutShape | None:
    """`shape` with the feed-forward width that hits `parameters`; None if no width does."""
    none, one = (replace(shape, intermediate_size=size) for size in (0, 1))
    fixed = count_parameters(config, none)
    exact = (parameters - fixed) / (count_parameters(config, one) - fixed)
    for multiple in _MULTIPLES:
        width = round(exact / multiple) * multiple
        if not 1 <= width <= shape.intermediate_size:
            continue
        solved = replace(shape, intermediate_size=width)
        if abs(count_parameters(config, solved) / parameters - 1) <= TOLERANCE:
            return solved
    return None


def _distance(base: CutShape, shape: CutShape) -> float:
    """How far the proportions are from the base's, in squared logarithms."""
    width = math.log(shape.hidden_size / base.hidden_size)
    depth = math.log(shape.num_layers / base.num_layers)
    mlp = math.log(shape.intermediate_size / base.intermediate_size)
    heads = math.log(shape.num_heads / base.num_heads)
    groups = math.log(shape.num_kv_heads / base.num_kv_heads)
    return width**2 + depth**2 + mlp**2 + 0.5 * heads**2 + 0.5 * groups**2
