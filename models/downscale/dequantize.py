"""A GGUF file as the base: its weights written as a checkpoint folder in fp32.

transformers reads the file. It leaves out what it has no place for and makes up what it misses,
without a word, so what it took is held against what the file holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from models.engines.stacked.layers import Rotary
from models.engines.stacked.model import frequencies
from models.errors import BaseError, PoolError
from models.sources.gguf import GgufFile, read_gguf
from models.tokenizer_json import read_tokenizer

# What is read of the architecture's keys, or shows in the shapes of tensors; what is allowed of
# others. Any further key must be empty, as it would change what llama.cpp computes.
_READ: Final = {
    *("context_length", "block_count", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
    *("attention.value_length", "attention.layer_norm_rms_epsilon"),
    *("rope.dimension_count", "rope.freq_base", "tensor_data_layout"),
}
_ALLOWED: Final[Mapping[str, tuple[object, ...]]] = {
    "attention.causal": (True,),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
}
_EMPTY: Final[tuple[object, ...]] = (0, "", [])
# Llama 3.1's and later models' scaling (Grattafiori et al. 2024) comes as what divides each
# frequency, and as nothing else; of its numbers only the largest, `factor`, differs.
_DIVISORS: Final = "rope_freqs.weight"
_LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT: Final = 8192


def dequantize(file: Path, folder: Path) -> Path:
    """Write the model in a GGUF file as a checkpoint folder in fp32, and return the folder.

    Raises:
        BaseError: transformers cannot read it or not all of it, or lacks the package that it reads
            it with; names the file and the key or tensors.
    """
    try:
        header = read_gguf(file)
        _check_keys(header)
    except PoolError as error:
        raise BaseError(f"base.checkpoint: {error}") from None
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError:
        raise BaseError(
            f"base.checkpoint: {file}: a GGUF file needs the package gguf; try: pip install gguf"
        ) from None
    except Exception as error:  # whatever the library makes of a damaged file
        raise BaseError(f"base.checkpoint: {file} cannot be read: {error}") from None
    model, found = loaded
    _take_scaling(header, model)
    _check_tensors(header, model, {*found["missing_keys"], *found["mismatched_keys"]})
    # They are plain weights now, which transformers would not write as long as it has these.
    del model.config.quantization_config, model.hf_quantizer
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The library reads some tokenizers almost as they are; those who serve this file read it so.
    read_tokenizer(file).save(str(folder / "tokenizer.json"))
    return folder


def _check_keys(header: GgufFile) -> None:
    """Refuse what the configuration of transformers would not have."""
    start = f"{header.architecture}."
    for name, value in header.metadata.items():
        key = name.removeprefix(start)
        if key in _READ or not name.startswith(start):
            continue
        allowed = _ALLOWED.get(key, _EMPTY)
        if value not in allowed:
            raise PoolError(
                f"{header.path}: {name} {value!r} is not supported of a GGUF file that is to be a "
                f"base; allowed is {' or '.join(map(repr, allowed))}. Name the checkpoint folder "
                "that the file was made from"
            )


def _take_scaling(header: GgufFile, model: PreTrainedModel) -> None:
    """Put the scaling of rotary embeddings into the configuration that a file's divisors tell."""
    if _DIVISORS not in header.tensors:
        return
    from gguf import GGUFReader  # noqa: PLC0415 - transformers had it

    stored = next(tensor for tensor in GGUFReader(header.path).tensors if tensor.name == _DIVISORS)
    divisors = torch.from_numpy(stored.data.copy()).float()
    theta = model.config.rope_parameters["rope_theta"]
    factors = {"factor": divisors.max().item(), **_LLAMA3}
    rotary = Rotary(
        dims=2 * len(divisors),
        theta=theta,
        scaling="llama3",
        original_context_tokens=_LLAMA3_CONTEXT,
        factors=tuple(factors.items()),
    )
    unscaled = frequencies(replace(rotary, scaling="default"), _LLAMA3_CONTEXT)
    expected = frequencies(rotary, _LLAMA3_CONTEXT)
    if rotary.dims != _head_dims(model) or not torch.allclose(
        unscaled / divisors, expected, rtol=1e-4
    ):
        raise BaseError(
            f"base.checkpoint: {header.path}: {_DIVISORS} is not as Llama 3 has it. Name the "
            "checkpoint folder that the file was made from"
        )
    model.config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
        **factors,
    }


def _check_tensors(header: GgufFile, model: PreTrainedModel, bad: set[Any]) -> None:
    """Refuse a model that has not all of the file's tensors, or others than the file's."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map  # noqa: PLC0415 - transformers had it

    said = f"base.checkpoint: {header.path}"
    if bad:
        raise BaseError(f"{said}: the tensors lack or misfit {sorted(map(str, bad))[:3]}")
    numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(numbers[header.architecture], model.config.num_hidden_layers)
    ends = (".weight", ".bias")
    taken = {names.get_name(name, ends) for name in model.state_dict()}
    left = sorted(header.tensors - taken - {_DIVISORS})
    if left:
        raise BaseError(
            f"{said}: the tensors {left[:3]} have no place in a {model.config.model_type} of "
            "transformers. Name the checkpoint folder that the file was made from"
        )
    dims = _head_dims(model)
    for key in ("attention.key_length", "rope.dimension_count"):
        if (found := header.value(key, dims)) != dims:
            raise BaseError(
                f"{said}: {header.architecture}.{key} {found} is not supported of a GGUF file that "
                f"is to be a base; transformers reads heads of {dims}, rotated as a whole"
            )


def _head_dims(model: PreTrainedModel) -> int:
    config = model.config
    dims: int = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    return dims
