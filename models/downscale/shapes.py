"""Chooses a chunk's shape: what is left open is chosen, the feed-forward width is solved.

Between shapes of equal size, the one nearest to the base's proportions wins. Width and depth weigh
alike: cutting width recovers better in large models (Muralidharan et al. 2024, Minitron), cutting
depth did in the small one that ships, so neither is favoured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from transformers import PretrainedConfig

from models.downscale.architecture import CutShape, check_shape, count_parameters, shape_of
from models.downscale.errors import BaseError
from models.downscale.recipe import MemberShape

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
