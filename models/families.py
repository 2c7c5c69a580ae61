"""What transformers assumes of an architecture where a config.json is silent.

Only keys that files do leave out have a default here: sizes must be stated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type`; `defaults` are those of its configuration class in transformers 5."""

    defaults: Mapping[str, Any] = field(default_factory=dict)


_LLAMA: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(defaults={**_LLAMA, "attention_bias": False, "mlp_bias": False}),
    "mistral": Family(
        defaults={
            **_LLAMA,
            "max_position_embeddings": 4096 * 32,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        }
    ),
    "qwen2": Family(
        defaults={
            **_LLAMA,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
        }
    ),
    "qwen3": Family(
        defaults={
            **_LLAMA,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 32,
            "head_dim": 128,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "max_window_layers": 28,
        }
    ),
}
