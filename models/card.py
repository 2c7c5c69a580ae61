"""Facts about a checkpoint, read from the checkpoint itself (never typed in by hand)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.adapter import Adapter
from models.chat_template import PromptFacts, prompt_facts_of, read_prompt_facts
from models.errors import PoolError
from models.families import FAMILIES
from models.sources.gguf import GgufFile, read_gguf
from models.sources.safetensors import StoredTensor, read_json, read_tensors
from models.tokenizer_json import read_tokenizer

# What downscaling can cut.
SUPPORTED_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"

_LARGEST_COUNT = 2**31  # no file says more that means it, and what is computed of it must fit

# How a checkpoint's makers draw its answers: the keys of generation_config.json that vLLM takes,
# which are requests' own names, and llama.cpp's names of the same (general.sampling.…).
_SAMPLING = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


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
    """Facts of one checkpoint, a folder of safetensors or a .gguf file at `path`.

    `source` finds the same files on another machine (see `sources.locate`). `parameters` counts
    every stored weight once (tied embeddings are stored once). `quantization` names how the weights
    are packed; None: they are plain floating-point numbers. `end_tokens` end an answer; the
    tokenizer's own is one of them, as it ends a turn of its template. `sampling` is how the
    makers draw answers, by the names of `SamplingOptions`; what they leave out or off is not there.
    `tokenizer_sha256` identifies the tokenizer, so that members can be checked to share one;
    `prompt_sha256` also the chat template and what it writes, so that conversations become the
    same tokens. With an `adapter` it is the card of that adapter's base, the adapter's parameters
    among the others.
    """

    path: Path
    source: str
    shape: Shape
    parameters: int
    context_tokens: int
    quantization: str | None
    end_tokens: frozenset[int]
    sampling: Mapping[str, float]
    tokenizer_sha256: str
    prompt_sha256: str
    adapter: Adapter | None = None

    @property
    def flops_per_token(self) -> float:
        """Inference FLOPs per token, 2N (Sengupta et al. 2025, eq. 15)."""
        return 2.0 * self.parameters

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file; else it is a folder."""
        return self.path.suffix == ".gguf"

    def adapted(self, adapter: Adapter) -> ModelCard:
        """Return the card of `adapter` on this base."""
        return replace(self, adapter=adapter, parameters=self.parameters + adapter.parameters)


def read_card(path: Path, *, source: str | None = None) -> ModelCard:
    """Read the card of a checkpoint, of whatever architecture; weights are not read.

    `source` is where it comes from, by default `path` itself. Raises `PoolError` that names the
    file that is missing or damaged, or the key, its value and what is allowed. Which engine can
    run it is for the engines to say.
    """
    if path.suffix == ".gguf":
        return _card_of_file(read_gguf(path), source or str(path))
    config = read_config(path)
    generation = read_json(path / GENERATION) if (path / GENERATION).is_file() else {}
    tokenizer = path / TOKENIZER
    facts = read_json(tokenizer)
    tensors = read_tensors(path)
    tokenizer_sha256 = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
    prompts = read_prompt_facts(path)
    shape = _read_shape(path / CONFIG, config)
    ends = _read_end_tokens(path, generation, config)
    ends |= _ids_of(prompts.special_tokens.get("eos_token"), tokenizer, facts)
    return ModelCard(
        path=path,
        source=source or str(path),
        shape=shape,
        parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        context_tokens=read_count(path / CONFIG, config, "max_position_embeddings"),
        quantization=_quantization(path, config, tensors),
        # Ids that the model cannot say end nothing, as in transformers.
        end_tokens=frozenset(end for end in ends if 0 <= end < shape.vocab_size),
        sampling=_read_sampling(path / GENERATION, {k: generation.get(k) for k in _SAMPLING}),
        tokenizer_sha256=tokenizer_sha256,
        prompt_sha256=_prompt_sha256(tokenizer_sha256, prompts),
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a checkpoint folder, completed as transformers would.

    What it leaves out is its architecture's default (`families`); of an architecture that is not
    there, the keys are brought to the names that most use.
    """
    config = read_json(folder / CONFIG)
    family = FAMILIES.get(str(config.get("model_type")))
    return _flat(config) if family is None else {**family.defaults, **config}


def read_count(file: Path, config: Mapping[str, Any], key: str) -> int:
    """Return the positive whole number at `key` of `file`; raises `PoolError`."""
    if key not in config:
        raise PoolError(f"{file}: the key {key!r} is missing")
    value = config[key]
    if type(value) is not int or not 0 < value < _LARGEST_COUNT:
        raise PoolError(
            f"{file}: {key} {value!r} is not allowed; a whole number above 0 and below "
            f"{_LARGEST_COUNT} is"
        )
    return value


def _card_of_file(file: GgufFile, source: str) -> ModelCard:
    file.check_runs()
    num_heads = file.value("attention.head_count")  # 0: state-space models have none
    hidden_size = file.value("embedding_length")
    tokenizer = {
        key: value
        for key, value in file.metadata.items()
        if key.startswith("tokenizer.") and not key.startswith("tokenizer.chat_template")
    }
    tokenizer_sha256 = _sha256(tokenizer)
    return ModelCard(
        path=file.path,
        source=source,
        shape=Shape(
            architecture=file.architecture,
            num_layers=file.value("block_count"),
            hidden_size=hidden_size,
            intermediate_size=file.value("feed_forward_length", 4 * hidden_size),
            num_heads=num_heads,
            num_kv_heads=file.value("attention.head_count_kv", num_heads),
            head_dim=file.value("attention.key_length", hidden_size // max(num_heads, 1)),
            vocab_size=len(file.tokens()),
        ),
        parameters=file.parameters,
        context_tokens=file.value("context_length"),
        quantization=file.quantization,
        end_tokens=file.end_tokens(),
        sampling=_read_sampling(
            file.path,
            {k: file.metadata.get(f"general.sampling.{its}") for k, its in _SAMPLING.items()},
        ),
        tokenizer_sha256=tokenizer_sha256,
        prompt_sha256=_prompt_sha256(tokenizer_sha256, prompt_facts_of(file)),
    )


def _prompt_sha256(tokenizer_sha256: str, facts: PromptFacts) -> str:
    said = (facts.templates, facts.special_tokens, facts.added_tokens)
    return _sha256([tokenizer_sha256, *map(dict, said)])


def _sha256(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read_shape(file: Path, config: Mapping[str, Any]) -> Shape:
    num_heads = read_count(file, config, "num_attention_heads")
    hidden_size = read_count(file, config, "hidden_size")

    def or_default(key: str, default: int) -> int:
        return default if config.get(key) is None else read_count(file, config, key)

    return Shape(
        architecture=str(config.get("model_type")),
        num_layers=read_count(file, config, "num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=read_count(file, config, "intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=or_default("num_key_value_heads", num_heads),
        head_dim=or_default("head_dim", hidden_size // num_heads),
        vocab_size=read_count(file, config, "vocab_size"),
    )


# GPT-2's names, which several families have kept.
_OTHER_NAMES = {
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "num_layers", "n_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "intermediate_size": ("n_inner", "ffn_dim", "hidden_dim"),
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
    if flat.get("intermediate_size") is None and isinstance(flat.get("hidden_size"), int):
        flat["intermediate_size"] = 4 * int(flat["hidden_size"])  # as transformers assumes
    return flat


# Where quantized checkpoints say that they are: keys of config.json, files of their own, and the
# scales and packed values that stand beside or in place of a weight.
_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")
_QUANTIZATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_QUANTIZED_TENSORS = (
    *("weight_scale", "weight_scale_inv", "weight_scale_2", "weight_zero_point", "weight_packed"),
    *("weight_shape", "weight_g_idx", "input_scale", "activation_scale", "k_scale", "v_scale"),
    *("scales", "biases", "qweight", "qzeros", "g_idx", "SCB", "weight_format"),
    *("absmax", "nested_absmax", "quant_map", "nested_quant_map", "_data", "_scale"),
)
_PLAIN_TYPES = ("F64", "F32", "F16", "BF16")


def _quantization(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> str | None:
    """Say how the weights are quantized, and where that is written; None if they are not."""
    for key in _QUANTIZATION_KEYS:
        if config.get(key) is not None:
            method = config[key].get("quant_method") if isinstance(config[key], dict) else None
            return f"{method or key} ({CONFIG}: {key})"
    for name in _QUANTIZATION_FILES:
        if (folder / name).is_file():
            return f"by {name}"
    for name, tensor in tensors.items():
        if tensor.dtype not in _PLAIN_TYPES and not name.endswith(".inv_freq"):
            return f"{tensor.dtype} ({tensor.file.name}: {name})"
        end = name.rpartition(".")[2]
        if end in _QUANTIZED_TENSORS or end.startswith("quant_state"):
            return f"with scales of its own ({tensor.file.name}: {name})"
    return None


def _read_sampling(file: Path, stated: Mapping[str, Any]) -> dict[str, float]:
    """Return the settings that are there and on; whether they are in range is the pool's to say."""
    for key, value in stated.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise PoolError(f"{file}: {key} {value!r} is not allowed; a number is")
    on = {key: value for key, value in stated.items() if value is not None}
    return {key: value for key, value in on.items() if key != "top_k" or value > 0}


def _read_end_tokens(
    folder: Path, generation: Mapping[str, Any], config: Mapping[str, Any]
) -> frozenset[int]:
    """Return what ends an answer: generation_config.json's tokens, else config.json's."""
    stated = []
    for file, facts in ((folder / GENERATION, generation), (folder / CONFIG, config)):
        found = facts.get("eos_token_id")
        if found is None:
            continue
        ends = found if isinstance(found, list) else [found]
        if not all(isinstance(end, int) and not isinstance(end, bool) for end in ends):
            raise PoolError(
                f"{file}: eos_token_id {found!r} is not allowed; a token id or a list of them is"
            )
        stated.append(frozenset(ends))
    return stated[0] if stated else frozenset()


def _ids_of(text: str | None, file: Path, tokenizer: Mapping[str, Any]) -> set[int]:
    """Return the id of the token `text` in `tokenizer`, which is `file`; nothing if it has none."""
    if text is None:
        return set()
    try:
        for token in tokenizer.get("added_tokens") or ():
            if token["content"] == text:
                return {int(token["id"])}
        vocabulary = (tokenizer.get("model") or {}).get("vocab")
        if isinstance(vocabulary, dict):
            found = {int(vocabulary[text])} if text in vocabulary else set()
        else:  # Unigram: pairs of token and score
            found = {index for index, entry in enumerate(vocabulary or ()) if entry[0] == text}
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise PoolError(f"{file} is no tokenizer: {type(error).__name__}: {error}") from None
    if found:
        return found
    # The files beside it add the token, at the end of the vocabulary.
    added = read_tokenizer(file.parent).token_to_id(text)
    return set() if added is None else {added}
