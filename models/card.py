"""Facts about a checkpoint, read from the checkpoint itself (never typed in by hand)."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import PoolError

SUPPORTED_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What members of one stacked engine must have in common; sizes in elements."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Architecture facts of one checkpoint folder.

    `parameters` counts every stored weight once (tied embeddings are stored once);
    `tokenizer_sha256` identifies the tokenizer, so that members can be checked to share one.
    """

    path: Path
    shape: Shape
    parameters: int
    context_tokens: int
    tokenizer_sha256: str

    @property
    def flops_per_token(self) -> float:
        """Inference FLOPs per token, 2N (Sengupta et al. 2025, eq. 15)."""
        return 2.0 * self.parameters


def read_card(path: Path, *, any_architecture: bool = False) -> ModelCard:
    """Read the card of a Hugging Face checkpoint folder with safetensors weights.

    Reads config.json, the safetensors headers and tokenizer.json, not the weights. Where another
    library computes the model, `any_architecture` lets others than our own through. Raises
    `PoolError` that names the missing file or the unsupported value.
    """
    config = _read_json(path / "config.json")
    if any_architecture:
        config = _flat(config)
    architecture = str(config.get("model_type"))
    if architecture not in SUPPORTED_ARCHITECTURES and not any_architecture:
        raise PoolError(
            f"{path / 'config.json'}: model_type {architecture!r} is not supported; "
            f"allowed are {', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    tokenizer = path / "tokenizer.json"
    if not tokenizer.is_file():
        raise PoolError(f"{tokenizer} is missing; a checkpoint needs its tokenizer beside it")
    try:
        num_heads = int(config["num_attention_heads"])
        shape = Shape(
            architecture=architecture,
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // num_heads),
            vocab_size=int(config["vocab_size"]),
        )
        context_tokens = int(config["max_position_embeddings"])
    except KeyError as error:
        raise PoolError(f"{path / 'config.json'}: the key {error} is missing") from None
    return ModelCard(
        path=path,
        shape=shape,
        parameters=_count_parameters(path),
        context_tokens=context_tokens,
        tokenizer_sha256=hashlib.sha256(tokenizer.read_bytes()).hexdigest(),
    )


def weight_files(path: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a checkpoint folder; `PoolError` if there are none."""
    files = tuple(sorted(path.glob("*.safetensors")))
    if not files:
        raise PoolError(f"{path} holds no *.safetensors file; no other weight format is read")
    return files


# GPT-2's names, which several families have kept.
_OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "num_layers"),
    "num_attention_heads": ("n_head",),
    "intermediate_size": ("n_inner", "ffn_dim"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "max_sequence_length"),
}


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """Return the language model's part of `config`, by the names that most models use."""
    text = config.get("text_config")
    flat = {**config, **text} if isinstance(text, dict) else dict(config)
    for name, others in _OTHER_NAMES.items():
        given = [flat[key] for key in (name, *others) if flat.get(key) is not None]
        if given:
            flat[name] = given[0]
    if flat.get("intermediate_size") is None and "hidden_size" in flat:
        flat["intermediate_size"] = 4 * int(flat["hidden_size"])  # as transformers assumes
    return flat


def _count_parameters(path: Path) -> int:
    total = 0
    for file in weight_files(path):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        total += sum(
            math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__"
        )
    return total


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise PoolError(f"{file} is missing; is {file.parent} a Hugging Face checkpoint folder?")
    try:
        data = json.loads(file.read_text())
    except ValueError as error:
        raise PoolError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise PoolError(f"{file} does not hold a JSON object")
    return data
