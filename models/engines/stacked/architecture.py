"""What a checkpoint's config.json says beyond its shape: rotary embedding, norms, biases, ends.

Only what the stacked model computes is accepted; anything that would change the result is refused
by name instead of being ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.card import ModelCard, Shape
from models.errors import PoolError

# What transformers assumes where config.json is silent.
_DEFAULT_ROPE_THETA = 10_000.0
_DEFAULT_NORM_EPS = 1e-6
_DEFAULT_MISTRAL_WINDOW_TOKENS = 4096


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3's rescaling of rotary frequencies (Grattafiori et al. 2024, section 3.2)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context_tokens: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything the forward pass must know that the weights don't say.

    `qk_norm` is Qwen3's norm of each query and key head.
    """

    shape: Shape
    context_tokens: int
    norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    tied_embeddings: bool
    qk_norm: bool

    def frequencies(self) -> Tensor:
        """Return the rotary frequencies, [head_dim / 2], float32, in radians per token."""
        exponents = torch.arange(0, self.shape.head_dim, 2, dtype=torch.float32)
        frequencies = 1.0 / self.rope_theta ** (exponents / self.shape.head_dim)
        scaling = self.rope_scaling
        if scaling is None:
            return frequencies
        # Slow waves are stretched by `factor`, fast ones kept, those between interpolated.
        waves_in_context = scaling.original_context_tokens * frequencies / (2 * math.pi)
        kept = (waves_in_context - scaling.low_freq_factor) / (
            scaling.high_freq_factor - scaling.low_freq_factor
        )
        kept = kept.clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / scaling.factor


def read_architecture(card: ModelCard) -> Architecture:
    """Read the architecture of a checkpoint; `PoolError` names a key that is not supported."""
    file = card.path / "config.json"
    config: dict[str, Any] = json.loads(file.read_text())
    for key, value in _unsupported(config):
        raise PoolError(f"{file}: {key} {value!r} is not supported by the stacked engine")
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    return Architecture(
        shape=card.shape,
        context_tokens=card.context_tokens,
        norm_eps=float(config.get("rms_norm_eps", _DEFAULT_NORM_EPS)),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta", _DEFAULT_ROPE_THETA)),
        rope_scaling=_read_scaling(file, rope),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm=card.shape.architecture == "qwen3",
    )


def read_end_tokens(card: ModelCard) -> frozenset[int]:
    """Return the tokens that end an answer: generation_config.json's, else config.json's."""
    for name in ("generation_config.json", "config.json"):
        file = card.path / name
        if file.is_file():
            ends = json.loads(file.read_text()).get("eos_token_id")
            if ends is not None:
                return frozenset(ends if isinstance(ends, list) else [ends])
    return frozenset()


def _unsupported(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found = []
    if config.get("hidden_act", "silu") != "silu":
        found.append(("hidden_act", config["hidden_act"]))
    if config.get("mlp_bias"):
        found.append(("mlp_bias", config["mlp_bias"]))
    if "sliding_attention" in (config.get("layer_types") or ()):
        found.append(("layer_types", config["layer_types"]))
    window_tokens = config.get("sliding_window")
    if config["model_type"] == "mistral" and "sliding_window" not in config:
        window_tokens = _DEFAULT_MISTRAL_WINDOW_TOKENS
    windowed = config["model_type"] == "mistral" or config.get("use_sliding_window")
    # A window that no sequence outgrows changes nothing.
    if windowed and window_tokens is not None and window_tokens < config["max_position_embeddings"]:
        found.append(("sliding_window", window_tokens))
    return found


def _read_scaling(file: Path, rope: Mapping[str, Any]) -> Llama3Scaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise PoolError(
            f"{file}: rope_type {kind!r} is not supported by the stacked engine; "
            "allowed are default, llama3"
        )
    try:
        return Llama3Scaling(
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_context_tokens=int(rope["original_max_position_embeddings"]),
        )
    except KeyError as error:
        raise PoolError(f"{file}: rope parameters: the key {error} is missing") from None
