"""The architectures that are read and computed here: how each differs from Llama.

`defaults` are what transformers 5 assumes where a config.json is silent, for keys that files do
leave out (sizes must be stated). Keys that are not among them mean nothing to that architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Norms: TypeAlias = Literal["before", "after", "around"]
"""Where a layer's norms stand: before attention and feed-forward, after them, or both."""

HeadNorms: TypeAlias = Literal["none", "each", "all"]
"""What queries and keys are normed over: each head by itself, or all heads together."""


Scaling: TypeAlias = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
"""How rotary frequencies are scaled, by the names of config.json."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One `model_type`.

    `qkv_bias`: always has biases of query, key and value. `gains_from_one`: gains of norms are
    stored less one. `packed`: query, key and value are one matrix in the file, and gate and up.
    `embedding_root`: embeddings are multiplied by the root of their size. `scalings`: the scaled
    rotary frequencies that transformers knows for it and that are computed here. `partly_rotated`:
    a `partial_rotary_factor` counts, the share of each head that is rotated.
    """

    defaults: Mapping[str, Any]
    norms: Norms = "before"
    head_norms: HeadNorms = "none"
    qkv_bias: bool = False
    gains_from_one: bool = False
    packed: bool = False
    embedding_root: bool = False
    scalings: tuple[Scaling, ...] = ("default", "linear", "dynamic", "llama3", "yarn")
    partly_rotated: bool = False


def _defaults(**changes: Any) -> Mapping[str, Any]:  # noqa: ANN401 - as JSON has them
    llama = {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
    }
    return llama | changes


_QWEN: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(defaults=_defaults(attention_bias=False, mlp_bias=False)),
    "mistral": Family(
        defaults=_defaults(
            max_position_embeddings=4096 * 32,
            num_key_value_heads=8,
            sliding_window=4096,
            layer_types=None,  # transformers takes Ministral's layers where it has them
        )
    ),
    "qwen2": Family(defaults=_defaults(**_QWEN), qkv_bias=True),
    "qwen3": Family(
        defaults=_defaults(**_QWEN, head_dim=128, attention_bias=False), head_norms="each"
    ),
    "phi3": Family(
        defaults=_defaults(
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
            original_max_position_embeddings=4096,
            sliding_window=None,
        ),
        packed=True,
        scalings=("default", "longrope"),
        partly_rotated=True,
    ),
    "smollm3": Family(
        defaults=_defaults(
            rope_theta=2_000_000.0,
            tie_word_embeddings=True,
            max_position_embeddings=32768,
            num_key_value_heads=4,
            attention_bias=False,
            mlp_bias=False,
            use_sliding_window=False,
            sliding_window=None,
            layer_types=None,
            no_rope_layers=None,
            no_rope_layer_interval=4,
        )
    ),
    "granite": Family(
        defaults=_defaults(
            attention_bias=False,
            mlp_bias=False,
            embedding_multiplier=1.0,
            residual_multiplier=1.0,
            attention_multiplier=1.0,
            logits_scaling=1.0,
        )
    ),
    "olmo2": Family(
        defaults=_defaults(rms_norm_eps=1e-5, attention_bias=False),
        norms="after",
        head_norms="all",
    ),
    "gemma": Family(
        defaults=_defaults(
            hidden_act="gelu_pytorch_tanh",
            tie_word_embeddings=True,
            max_position_embeddings=8192,
            num_key_value_heads=16,
            head_dim=256,
            attention_bias=False,
            use_bidirectional_attention=None,
        ),
        gains_from_one=True,
        embedding_root=True,
    ),
    "gemma3_text": Family(
        defaults=_defaults(
            hidden_act=None,
            hidden_activation="gelu_pytorch_tanh",
            rope_theta=1_000_000.0,
            rope_local_base_freq=10_000.0,
            tie_word_embeddings=True,
            max_position_embeddings=131_072,
            num_key_value_heads=4,
            head_dim=256,
            attention_bias=False,
            query_pre_attn_scalar=256,
            sliding_window=4096,
            sliding_window_pattern=6,
            layer_types=None,
            final_logit_softcapping=None,
            attn_logit_softcapping=None,
            use_bidirectional_attention=False,
        ),
        norms="around",
        head_norms="each",
        gains_from_one=True,
        embedding_root=True,
    ),
}
