"""GGUF files as bases: what is read is what the file holds, and what would be lost is refused."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models.downscale.base import load_base
from models.downscale.dequantize import dequantize
from models.errors import BaseError
from tests.models.downscale.tiny_models import tiny_model

TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}


def in_pairs(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Order a head's rows as llama.cpp rotates them in a llama: neighbours, not halves."""
    halves = rows.reshape(num_heads, 2, -1, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def write(
    file: Path,
    model: PreTrainedModel,
    kind: Type = Type.F32,
    *,
    keys: Mapping[str, Any] = {},
    more: Sequence[str] = (),
    divisors: Sequence[float] = (),
    without: Sequence[str] = (),
) -> Path:
    """Write `model` as llama.cpp's converter does; matrices are of `kind`.

    `model` gets the weights that are left of its own by that.
    """
    config, architecture = model.config, model.config.model_type
    dims = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(dims)
    writer.add_key_length(dims)
    for key, value in keys.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
        add[type(value)](f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = ["a", "b", "ab", *(f"<{index}>" for index in range(3, config.vocab_size))]
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)
    for name, parameter in model.named_parameters():
        module, _, end = name.rpartition(".")
        layer = f"blk.{module.split('.')[2]}." if ".layers." in module else ""
        ours = module.split(".", 3)[3] if layer else module
        stored = f"{layer}{TENSORS[ours]}.{end}"
        if stored in without:
            continue
        values = parameter.detach().numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        permuted = heads.get(TENSORS[ours]) if architecture == "llama" else None
        if permuted:
            values = in_pairs(values, permuted)
        if values.ndim == 2:
            packed = gguf.quants.quantize(values, kind)
            writer.add_tensor(stored, packed, raw_dtype=kind)
            left = gguf.quants.dequantize(packed, kind)
            if permuted:  # a head's even rows, then its odd ones
                pairs = left.reshape(permuted, -1, 2, left.shape[1]).swapaxes(1, 2)
                left = pairs.reshape(left.shape)
            parameter.data.copy_(torch.from_numpy(np.ascontiguousarray(left)))
        else:
            writer.add_tensor(stored, values)
    if divisors:
        writer.add_tensor("rope_freqs.weight", np.array(divisors, np.float32))
    for name in more:
        writer.add_tensor(name, np.full(4, 8.0, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def model_of(architecture: str, *, tied: bool = True) -> PreTrainedModel:
    """A tiny model; transformers reads no other heads of Qwen3 than those of 128."""
    if architecture != "qwen3":
        return tiny_model(architecture, tied=tied)
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = tiny_model(architecture, tied=tied).config.to_dict() | {"head_dim": 128}
    return Qwen3ForCausalLM(Qwen3Config(**config)).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Type.F32, Type.BF16, Type.Q4_0, Type.Q5_1, Type.Q8_0])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_base_is_what_its_file_holds(architecture, kind, tied, tmp_path):
    """Rows that llama.cpp permutes, biases and heads of its own give the model's own logits."""
    model = model_of(architecture, tied=tied)
    file = write(tmp_path / "model.gguf", model, kind)
    loaded, _ = load_base(dequantize(file, tmp_path / "base"))
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_keeps_its_scaling(factor, tmp_path):
    """llama.cpp's converter writes what it divides frequencies by, in place of config.json's."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        **tiny_model("llama").config.to_dict()
        | {"head_dim": 16, "rope_parameters": scaling, "max_position_embeddings": 131_072}
    )
    model = LlamaForCausalLM(config).eval()
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    divisors = 500_000.0 ** (-torch.arange(0, 16, 2) / 16) / scaled
    assert 1 < divisors.max() <= factor
    file = write(tmp_path / "model.gguf", model, divisors=divisors.tolist())
    loaded, _ = load_base(dequantize(file, tmp_path / "base"))
    places = torch.arange(30_000, 30_060)[None]  # where it tells
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(torch.arange(60)[None], position_ids=places).logits,
            model(torch.arange(60)[None], position_ids=places).logits,
        )


@pytest.mark.parametrize(
    ("architecture", "file", "message"),
    [
        ("llama", {"divisors": [1.0, 2.0]}, r"rope_freqs\.weight is not as Llama 3 has it"),
        ("llama", {"more": ["blk.0.attn_v.bias"]}, r"\['blk\.0\.attn_v\.bias'\] have no place"),
        ("qwen2", {"more": ["blk.1.attn_q_norm.weight"]}, r"attn_q_norm\.weight'\] have no place"),
        ("llama", {"without": ["blk.1.ffn_up.weight"]}, r"layers\.1\.mlp\.up_proj\.weight"),
        ("qwen2", {"without": ["blk.0.attn_q.bias"]}, r"layers\.0\.self_attn\.q_proj\.bias"),
        ("llama", {"keys": {"rope.scaling.type": "linear"}}, r"llama\.rope\.scaling\.type 'linear"),
        ("qwen2", {"keys": {"rope.scaling.factor": 4.0}}, r"qwen2\.rope\.scaling\.factor 4\.0"),
        ("llama", {"keys": {"attention.scale": 0.5}}, r"attention\.scale 0\.5 is not supported"),
        ("llama", {"keys": {"expert_count": 8}}, r"expert_count 8 is not supported"),
    ],
)
def test_what_would_be_lost_is_refused(architecture, file, message, tmp_path):
    """transformers passes over these, or draws what is missing by lot."""
    written = write(tmp_path / "model.gguf", tiny_model(architecture), **file)
    with pytest.raises(BaseError, match=message):
        dequantize(written, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_heads_that_transformers_takes_for_others_are_refused(tmp_path):
    """Of Qwen3 it reads no length of a head."""
    file = write(tmp_path / "model.gguf", tiny_model("qwen3"))
    with pytest.raises(BaseError, match=r"qwen3\.attention\.key_length 8 .* heads of 128"):
        dequantize(file, tmp_path / "base")
