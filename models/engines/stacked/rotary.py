"""The frequencies of the rotary embedding under each scaling, as transformers computes them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.engines.stacked.layers import Rotary


def rotations(rotary: Rotary, head_dim: int, context_tokens: int) -> Tensor:
    """Return the turn of every position and pair, [T, head_dim / 2], complex64.

    Their length is 1, or what YaRN multiplies queries and keys by.
    """
    positions_T = torch.arange(context_tokens, dtype=torch.float32)
    angles = torch.outer(positions_T, frequencies(rotary, head_dim))
    return torch.polar(torch.full_like(angles, _length(rotary)), angles)


def frequencies(rotary: Rotary, head_dim: int) -> Tensor:
    """Return the frequencies, [head_dim / 2], float32, in radians per token."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain = 1.0 / rotary.theta**exponents
    factors = dict(rotary.factors)
    match rotary.scaling:
        case "linear":
            return plain / factors["factor"]
        case "llama3":
            return _llama3(plain, rotary)
        case "yarn":
            return _yarn(plain, rotary, head_dim)
        case "default" | "dynamic":  # dynamic changes nothing within the model's context
            return plain


def _llama3(plain: Tensor, rotary: Rotary) -> Tensor:
    """Grattafiori et al. 2024, section 3.2: slow waves are stretched by `factor`, fast ones kept,
    those between interpolated.
    """
    factors = dict(rotary.factors)
    low, high = factors["low_freq_factor"], factors["high_freq_factor"]
    waves_in_context = rotary.original_context_tokens * plain / (2 * math.pi)
    kept = ((waves_in_context - low) / (high - low)).clamp(0, 1)
    return kept * plain + (1 - kept) * plain / factors["factor"]


def _yarn(plain: Tensor, rotary: Rotary, head_dim: int) -> Tensor:
    """Peng et al. 2023, section 3.2: as above, with a ramp over the dimensions."""
    factors = {"beta_fast": 32.0, "beta_slow": 1.0, **dict(rotary.factors)}

    def dimension(turns: float) -> float:
        """Return the dimension that turns so often within the original context."""
        waves = rotary.original_context_tokens / (turns * 2 * math.pi)
        return head_dim * math.log(waves) / (2 * math.log(rotary.theta))

    low, high = dimension(factors["beta_fast"]), dimension(factors["beta_slow"])
    if rotary.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return kept * plain + (1 - kept) * plain / factors["factor"]


def _length(rotary: Rotary) -> float:
    """Return what YaRN multiplies queries and keys by (section 3.4, "attention temperature")."""
    factors = dict(rotary.factors)
    if rotary.scaling != "yarn":
        return 1.0
    if "attention_factor" in factors:
        return factors["attention_factor"]

    def temperature(weight: float) -> float:
        factor = factors["factor"]
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if "mscale" in factors and "mscale_all_dim" in factors:
        return temperature(factors["mscale"]) / temperature(factors["mscale_all_dim"])
    return temperature(1.0)
