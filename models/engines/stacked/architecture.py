"""What a checkpoint's config.json says beyond its shape, and whether its tensors agree with it.

Only what the stacked model computes is accepted, and exactly as transformers computes it; anything
that would change the result is refused by name instead of being ignored. No tensor library is
needed, so that every process that reads a pool can ask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast, get_args

from models.card import CONFIG, SUPPORTED_ARCHITECTURES, ModelCard, Shape, read_config, read_count
from models.errors import PoolError
from models.families import FAMILIES
from models.sources.safetensors import StoredTensor, read_tensors

Scaling: TypeAlias = Literal["default", "linear", "dynamic", "llama3", "yarn"]

_DEFAULT_ROPE_THETA = 10_000.0  # transformers'
_SILU = ("silu", "swish")  # two names of one function
_BOUNDED = ("llama3", "yarn")  # scalings that start from the context the model was made with
_NEEDED: Mapping[Scaling, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")  # if given


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ENDS = {EMBEDDING, HEAD}


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """The rotary embedding: its base, and how its frequencies are scaled (see `rotary`).

    `factors` are the scaling's own numbers by the names of config.json.
    """

    theta: float
    scaling: Scaling = "default"
    original_context_tokens: int
    truncate: bool = True
    factors: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything the forward pass must know that the weights don't say.

    `qk_norm` is Qwen3's norm of each query and key head. `tied_embeddings`: a checkpoint without a
    language-model head uses its embeddings.
    """

    shape: Shape
    context_tokens: int
    norm_eps: float
    rotary: Rotary
    tied_embeddings: bool
    qk_norm: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool


def read_architecture(card: ModelCard) -> Architecture:
    """Read the architecture of a checkpoint and hold its tensors against it.

    Raises `PoolError` that names the key or tensor, its value or shape, and what is allowed.
    """
    if card.is_gguf:
        raise PoolError(f"{card.path}: the stacked engine reads folders of safetensors, no GGUF")
    file, kind = card.path / CONFIG, card.shape.architecture
    if kind not in SUPPORTED_ARCHITECTURES:
        raise PoolError(
            f"{file}: model_type {kind!r} is not supported; "
            f"allowed are {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    if card.quantization is not None:
        raise PoolError(
            f"{card.path}: the weights are quantized: {card.quantization}; the stacked engine "
            "computes with F32, F16 and BF16"
        )
    config = read_config(card.path)
    _check_supported(file, config)
    known = FAMILIES[kind].defaults  # of others transformers takes no notice
    biased = "attention_bias" in known and _flag(file, config, "attention_bias")
    architecture = Architecture(
        shape=card.shape,
        context_tokens=card.context_tokens,
        norm_eps=_number(file, config, "rms_norm_eps"),
        rotary=_read_rotary(file, config),
        tied_embeddings=_flag(file, config, "tie_word_embeddings"),
        qk_norm=kind == "qwen3",
        qkv_bias=biased or kind == "qwen2",
        output_bias=biased,
        mlp_bias="mlp_bias" in known and _flag(file, config, "mlp_bias"),
    )
    _check_tensors(card.path, architecture, read_tensors(card.path))
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


def _check_supported(file: Path, config: Mapping[str, Any]) -> None:
    if config.get("hidden_act") not in _SILU:
        raise PoolError(
            f"{file}: hidden_act {config.get('hidden_act')!r} is not supported by the stacked "
            f"engine; allowed are {', '.join(_SILU)}"
        )
    if config.get("per_layer_config"):
        raise PoolError(f"{file}: per_layer_config is not supported by the stacked engine")
    if "sliding_attention" in (config.get("layer_types") or ()):
        raise PoolError(
            f"{file}: layer_types {config['layer_types']!r} are not supported by the stacked "
            "engine; allowed is full_attention"
        )
    window_tokens = config.get("sliding_window")
    windowed = config["model_type"] == "mistral" or config.get("use_sliding_window")
    # A window that no sequence outgrows changes nothing.
    if windowed and window_tokens is not None and window_tokens < config["max_position_embeddings"]:
        raise PoolError(
            f"{file}: sliding_window {window_tokens} is not supported by the stacked engine; "
            "null, or at least max_position_embeddings, is"
        )


def _read_rotary(file: Path, config: Mapping[str, Any]) -> Rotary:
    """Read either spelling as transformers 5 does: `rope_scaling` first, else `rope_parameters`."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise PoolError(f"{file}: rope_parameters {rope!r} is not a mapping")
    theta = rope if "rope_theta" in rope else {"rope_theta": _DEFAULT_ROPE_THETA, **config}
    kind = cast(Scaling, rope.get("rope_type", rope.get("type", "default")))
    if kind not in get_args(Scaling):
        raise PoolError(
            f"{file}: rope_type {kind!r} is not supported by the stacked engine; "
            f"allowed are {', '.join(get_args(Scaling))}"
        )
    for found in (rope, config):
        if found.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise PoolError(
                f"{file}: partial_rotary_factor {found['partial_rotary_factor']!r} is not "
                "supported by the stacked engine; allowed is 1.0"
            )
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
    given = _NEEDED.get(kind, ())
    if kind == "yarn":
        given = ("factor", *(key for key in _YARN if rope.get(key) is not None))
    return Rotary(
        theta=_number(file, theta, "rope_theta"),
        scaling=kind,
        original_context_tokens=context_tokens,
        truncate=_flag(file, {"truncate": True, **rope}, "truncate"),
        factors=tuple((key, _number(file, rope, key)) for key in given),
    )


def _check_tensors(
    folder: Path, architecture: Architecture, stored: Mapping[str, StoredTensor]
) -> None:
    """Refuse tensors that are missing, of another shape, or that the config knows nothing of."""
    expected = _expected_tensors(architecture)
    for name, shape in expected.items():
        if name not in stored:
            if architecture.tied_embeddings and name in _ENDS and _ENDS & stored.keys():
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


def _expected_tensors(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    shape = architecture.shape
    hidden, inner, head = shape.hidden_size, shape.intermediate_size, shape.head_dim
    query, key = shape.num_heads * head, shape.num_kv_heads * head
    products = {
        "self_attn.q_proj": (query, hidden, architecture.qkv_bias),
        "self_attn.k_proj": (key, hidden, architecture.qkv_bias),
        "self_attn.v_proj": (key, hidden, architecture.qkv_bias),
        "self_attn.o_proj": (hidden, query, architecture.output_bias),
        "mlp.gate_proj": (inner, hidden, architecture.mlp_bias),
        "mlp.up_proj": (inner, hidden, architecture.mlp_bias),
        "mlp.down_proj": (hidden, inner, architecture.mlp_bias),
    }
    gains = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if architecture.qk_norm:
        gains |= {"self_attn.q_norm": head, "self_attn.k_norm": head}
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


def _number(file: Path, config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise PoolError(f"{file}: {key} {value!r} is not allowed; a number above 0 is")
    return float(value)


def _flag(file: Path, config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if not isinstance(value, bool):
        raise PoolError(f"{file}: {key} {value!r} is not allowed; true or false is")
    return value
