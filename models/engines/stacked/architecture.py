"""What a checkpoint's config.json says beyond its shape, and whether its tensors agree with it.

Only what the stacked model computes is accepted, and exactly as transformers computes it; anything
that would change the result is refused by name instead of being ignored. No tensor library is
needed, so that every process that reads a pool can ask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from models.adapter import ADAPTER_CONFIG
from models.card import CONFIG, ModelCard, Shape, read_config
from models.engines.stacked.layers import LayerKind, read_flag, read_layers, read_number
from models.errors import PoolError
from models.families import FAMILIES, Family, HeadNorms, Norms
from models.sources.safetensors import StoredTensor, read_tensors

Activation: TypeAlias = Literal["silu", "gelu_tanh"]

_ACTIVATIONS: Mapping[str, Activation] = {  # transformers' names
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}

# Keys that change the result, whatever their value, if only they have one.
_REFUSED = (
    *("per_layer_config", "attn_logit_softcapping", "use_bidirectional_attention"),
    "transformers_weights",  # names other files than are read
)

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


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything the forward pass must know that the weights don't say.

    `tied_embeddings`: a checkpoint without a language-model head uses its embeddings. Scores are
    multiplied by `attention_scale`, what a layer adds by `residual_scale`, embeddings by
    `embedding_scale` and logits by `logit_scale`; `logit_cap` bounds them by a tanh.
    """

    shape: Shape
    context_tokens: int
    layers: tuple[LayerKind, ...]
    norms: Norms
    head_norms: HeadNorms
    norm_eps: float
    gains_from_one: bool
    packed: bool
    activation: Activation
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    attention_scale: float
    residual_scale: float
    embedding_scale: float
    logit_scale: float
    logit_cap: float | None

    @property
    def rotated_dims(self) -> int:
        """How many of a head's dimensions are rotated, from the first; all layers rotate alike."""
        return max((layer.rotary.dims for layer in self.layers if layer.rotary), default=0)

    @property
    def is_plain(self) -> bool:
        """Whether layers are alike and as Llama's, Mistral's or Qwen's, without a window."""
        return (
            len(set(self.layers)) == 1
            and self.layers[0].window_tokens is None
            and self.norms == "before"
            and self.head_norms != "all"
            and self.activation == "silu"
            and self.attention_scale == 1 / math.sqrt(self.shape.head_dim)
            and (self.residual_scale, self.embedding_scale, self.logit_scale) == (1, 1, 1)
            and self.logit_cap is None
            and not (self.mlp_bias or self.packed or self.gains_from_one)
        )


def read_architecture(card: ModelCard) -> Architecture:
    """Read the architecture of a checkpoint and hold its tensors against it.

    Raises `PoolError` that names the key or tensor, its value or shape, and what is allowed.
    """
    if card.is_gguf:
        raise PoolError(f"{card.path}: the stacked engine reads folders of safetensors, no GGUF")
    file, kind = card.path / CONFIG, card.shape.architecture
    if kind not in FAMILIES:
        raise PoolError(
            f"{file}: model_type {kind!r} is not supported; allowed are {', '.join(FAMILIES)}"
        )
    if card.quantization is not None:
        raise PoolError(
            f"{card.path}: the weights are quantized: {card.quantization}; the stacked engine "
            "computes with F32, F16 and BF16"
        )
    config = read_config(card.path)
    family = FAMILIES[kind]
    for key in _REFUSED:
        if config.get(key):
            raise PoolError(f"{file}: {key} {config[key]!r} is not supported by the stacked engine")
    if not config.get("is_causal", True):  # encoders made of decoders see what follows, too
        raise PoolError(f"{file}: is_causal {config['is_causal']!r} is not supported; true is")
    if (card.path / ADAPTER_CONFIG).is_file():
        raise PoolError(
            f"{card.path / ADAPTER_CONFIG}: transformers would serve the base that it names with "
            "this adapter; allowed are a folder without one, or `adapter` in place of `checkpoint`"
        )
    biased = _known_flag(file, config, family, "attention_bias")
    architecture = Architecture(
        shape=card.shape,
        context_tokens=card.context_tokens,
        layers=read_layers(file, config, family, card.shape.head_dim),
        norms=family.norms,
        head_norms=family.head_norms,
        norm_eps=read_number(file, config, "rms_norm_eps"),
        gains_from_one=family.gains_from_one,
        packed=family.packed,
        activation=_activation(file, config, family),
        tied_embeddings=_known_flag(file, config, family, "tie_word_embeddings"),
        qkv_bias=biased or family.qkv_bias,
        output_bias=biased,
        mlp_bias=_known_flag(file, config, family, "mlp_bias"),
        attention_scale=_attention_scale(file, config, family, card.shape),
        residual_scale=_known_scale(file, config, family, "residual_multiplier"),
        embedding_scale=math.sqrt(card.shape.hidden_size)
        if family.embedding_root
        else _known_scale(file, config, family, "embedding_multiplier"),
        logit_scale=1 / _known_scale(file, config, family, "logits_scaling"),
        logit_cap=None
        if "final_logit_softcapping" not in family.defaults
        or config["final_logit_softcapping"] is None
        else read_number(file, config, "final_logit_softcapping"),
    )
    check_tensors(card.path, architecture, read_tensors(card.path))
    return architecture


def read_stack(cards: Sequence[ModelCard]) -> Architecture:
    """Return the one architecture of all members of a stack.

    Whether embeddings are tied is each member's own affair. Raises `PoolError` as
    `read_architecture`, and where members differ, naming in what.
    """
    first, *rest = cards
    architecture = read_architecture(first)
    for card in rest:
        other = read_architecture(card)
        for field in fields(Architecture):
            its, ours = getattr(other, field.name), getattr(architecture, field.name)
            if its != ours and field.name != "tied_embeddings":
                raise PoolError(
                    f"{card.path / CONFIG}: members of a stacked engine need one architecture, "
                    f"but its {field.name} is {its} and that of {first.path} is {ours}"
                )
    return architecture


def _activation(file: Path, config: Mapping[str, Any], family: Family) -> Activation:
    key = "hidden_act" if family.defaults["hidden_act"] else "hidden_activation"
    if family.defaults["hidden_act"] == "gelu_pytorch_tanh" and config["hidden_act"] == "gelu":
        return "gelu_tanh"  # what Gemma's first files mean
    if str(config.get(key)) not in _ACTIVATIONS:
        raise PoolError(
            f"{file}: {key} {config.get(key)!r} is not supported by the stacked engine; "
            f"allowed are {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[config[key]]


def _attention_scale(file: Path, config: Mapping[str, Any], family: Family, shape: Shape) -> float:
    if "attention_multiplier" in family.defaults:
        return read_number(file, config, "attention_multiplier")
    if "query_pre_attn_scalar" in family.defaults:
        return 1 / math.sqrt(read_number(file, config, "query_pre_attn_scalar"))
    return 1 / math.sqrt(shape.head_dim)


def _known_scale(file: Path, config: Mapping[str, Any], family: Family, key: str) -> float:
    return read_number(file, config, key) if key in family.defaults else 1.0


def _known_flag(file: Path, config: Mapping[str, Any], family: Family, key: str) -> bool:
    return key in family.defaults and read_flag(file, config, key)


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
