"""Which tensors a checkpoint must have by its config.json, and whether its files have them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from models.card import CONFIG
from models.errors import PoolError
from models.families import Norms
from models.sources.safetensors import StoredTensor

if TYPE_CHECKING:
    from models.engines.stacked.architecture import Architecture

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_EITHER = {EMBEDDING, HEAD}  # one of these is enough where they are tied

# The norms of a layer: before attention and feed-forward, and after each.
NORMS_BEFORE: Mapping[Norms, tuple[str, ...]] = {
    "before": ("input_layernorm", "post_attention_layernorm"),
    "around": ("input_layernorm", "pre_feedforward_layernorm"),
    "after": (),
}
NORMS_AFTER: Mapping[Norms, tuple[str, ...]] = {
    "before": (),
    "around": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
}


def check_tensors(
    folder: Path, architecture: Architecture, stored: Mapping[str, StoredTensor]
) -> None:
    """Refuse tensors that are missing, of another shape, or that the config knows nothing of.

    Raises `PoolError` that names the tensor, its shape and the one expected.
    """
    expected = _expected_tensors(architecture)
    for name, shape in expected.items():
        if name not in stored:
            if architecture.tied_embeddings and name in _EITHER and _EITHER & stored.keys():
                continue
            raise PoolError(
                f"{folder}: the tensor {name} is missing, which {CONFIG} asks for with the shape "
                f"{list(shape)}"
            )
        if stored[name].shape != shape:
            raise PoolError(
                f"{stored[name].file}: the tensor {name} has the shape "
                f"{list(stored[name].shape)}, but {CONFIG} asks for {list(shape)}"
            )
    for name, tensor in stored.items():
        if name not in expected and not name.endswith(".inv_freq"):  # frequencies are computed
            what = "bias" if name.endswith("bias") else "tensor"
            raise PoolError(
                f"{tensor.file}: the {what} {name} is none that {CONFIG} asks for; transformers "
                "would leave it out"
            )


def _expected_tensors(known: Architecture) -> dict[str, tuple[int, ...]]:
    shape = known.shape
    hidden, inner, head = shape.hidden_size, shape.intermediate_size, shape.head_dim
    query, key = shape.num_heads * head, shape.num_kv_heads * head
    if known.packed:
        products = {
            "self_attn.qkv_proj": (query + 2 * key, hidden, known.qkv_bias),
            "mlp.gate_up_proj": (2 * inner, hidden, known.mlp_bias),
        }
    else:
        products = {
            "self_attn.q_proj": (query, hidden, known.qkv_bias),
            "self_attn.k_proj": (key, hidden, known.qkv_bias),
            "self_attn.v_proj": (key, hidden, known.qkv_bias),
            "mlp.gate_proj": (inner, hidden, known.mlp_bias),
            "mlp.up_proj": (inner, hidden, known.mlp_bias),
        }
    products["self_attn.o_proj"] = (hidden, query, known.output_bias)
    products["mlp.down_proj"] = (hidden, inner, known.mlp_bias)
    gains = dict.fromkeys((*NORMS_BEFORE[known.norms], *NORMS_AFTER[known.norms]), hidden)
    if known.head_norms != "none":
        every = known.head_norms == "all"
        gains |= {"self_attn.q_norm": query if every else head}
        gains |= {"self_attn.k_norm": key if every else head}
    tensors: dict[str, tuple[int, ...]] = {
        EMBEDDING: (shape.vocab_size, hidden),
        "model.norm.weight": (hidden,),
        HEAD: (shape.vocab_size, hidden),
    }
    for index in range(shape.num_layers):
        layer = f"model.layers.{index}"
        tensors |= {f"{layer}.{name}.weight": (size,) for name, size in gains.items()}
        for name, (rows, columns, biased) in products.items():
            tensors[f"{layer}.{name}.weight"] = (rows, columns)
            if biased:
                tensors[f"{layer}.{name}.bias"] = (rows,)
    return tensors
