"""What is served is what transformers computes, over the grid that real checkpoints vary.

Tiny random checkpoints, saved by transformers and read by us: the log-probabilities of the first
step and the greedy tokens of the next must be its own.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.card import read_card
from tests.models.engines.stacked.tiny import (
    answer,
    build_engine,
    edit_config,
    load_reference,
    request,
    save_checkpoint,
    token_ids,
)

PROMPT = [(7 * i * i + 3 * i) % 300 + 2 for i in range(90)]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

# name: architecture, what the checkpoint is made with, what its config.json is changed to
GRID: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", {}, {}),
    "linear": ("llama", {}, {"rope_parameters": {"rope_type": "linear", "factor": 3.0}}),
    "linear, older spelling": (
        "llama",
        {},
        {
            "rope_parameters": ...,
            "rope_theta": 900.0,
            "rope_scaling": {"type": "linear", "factor": 3.0},
        },
    ),
    "dynamic": ("llama", {}, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama3": ("llama", {}, {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}}),
    "llama3, older spelling": (
        "llama",
        {},
        {"rope_parameters": ..., "rope_theta": 500.0, "rope_scaling": LLAMA3},
    ),
    "both spellings": (
        "llama",
        {},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_scaling": LLAMA3},
    ),
    "yarn": ("qwen2", {}, {"rope_parameters": YARN}),
    "yarn, its own factors": (
        "qwen3",
        {},
        {"rope_scaling": {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False}},
    ),
    "yarn, attention factor": (
        "llama",
        {},
        {"rope_scaling": {**YARN, "attention_factor": 0.7}, "rope_theta": 300.0},
    ),
    "yarn, mscale": (
        "llama",
        {},
        {"rope_parameters": {**YARN, "factor": None, "mscale": 0.8, "mscale_all_dim": 0.5}},
    ),
    "rotary base at the top": ("llama", {}, {"rope_parameters": ..., "rope_theta": 250.0}),
    "rotary base by default": ("llama", {}, {"rope_parameters": ...}),
    "one key/value head": ("mistral", {"num_key_value_heads": 1}, {}),
    "as many key/value heads": ("qwen2", {"num_key_value_heads": 4}, {"num_key_value_heads": None}),
    "head_dim": ("llama", {"head_dim": 32}, {}),
    "attention biases": ("llama", {"attention_bias": True}, {}),
    "biases of the feed-forward": ("llama", {"mlp_bias": True}, {}),
    "biases of qwen3": ("qwen3", {"attention_bias": True}, {}),
    "an unknown bias flag": ("mistral", {}, {"attention_bias": True, "mlp_bias": True}),
    "norm epsilon": ("llama", {}, {"rms_norm_eps": 0.3}),
    "norm epsilon by default": ("llama", {"rms_norm_eps": 1e-6}, {"rms_norm_eps": ...}),
    "tied": ("qwen3", {"tie_word_embeddings": True}, {}),
    "untied by default": ("llama", {"tie_word_embeddings": False}, {"tie_word_embeddings": ...}),
    "tied, but with a head of its own": (
        "llama",
        {"tie_word_embeddings": False},
        {"tie_word_embeddings": True},
    ),
    "a window longer than the context": ("mistral", {"sliding_window": 4096}, {}),
    "a window that is off": ("qwen2", {}, {"sliding_window": 8, "use_sliding_window": False}),
    "swish": ("llama", {}, {"hidden_act": "swish"}),
    "a padded vocabulary": ("llama", {"vocab_size": 384}, {}),
    "key/value heads by default": (
        "mistral",
        {"num_attention_heads": 16, "num_key_value_heads": 8},
        {"num_key_value_heads": ...},
    ),
    "heads of 128 by default": ("qwen3", {"head_dim": 128}, {"head_dim": ...}),
}


def check(folder: Path, *, tolerance: float = 2e-4) -> None:
    """Compare the first step's ten best log-probabilities, and 24 greedy tokens."""
    reference = load_reference(folder)
    engine = build_engine([folder])
    wanted = request(PROMPT, max_tokens=24, top_logprobs=10, ignore_eos=True)
    [chunks] = answer(engine, wanted)
    first = next(token for chunk in chunks for token in chunk.tokens)
    prompt = torch.tensor([PROMPT])
    with torch.no_grad():
        logp_V = reference(prompt).logits[0, -1].log_softmax(-1)
        best = logp_V.topk(10)
        tokens = prompt
        for _ in range(24):
            tokens = torch.cat([tokens, reference(tokens).logits[:, -1].argmax(-1)[:, None]], 1)
    assert [top.token_id for top in first.top] == best.indices.tolist()
    assert [top.logprob for top in first.top] == pytest.approx(best.values.tolist(), abs=tolerance)
    assert token_ids(chunks) == tokens[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("case", GRID)
def test_served_as_transformers_computes(case: str, tmp_path: Path) -> None:
    """Log-probabilities and greedy tokens of one point of the grid are transformers' own."""
    kind, options, changes = GRID[case]
    if kind == "llama":
        options = {"attention_bias": False, **options}
    folder = save_checkpoint(tmp_path, kind, **options)
    edit_config(folder, **changes)
    check(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_of_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    """Weights are read in the type they are stored in, several types in one file as well."""
    from safetensors.torch import load_file, save_file

    folder = save_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    mixed = {k: v.to(dtype) if "proj" in k else v for k, v in tensors.items()}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    check(folder)


def test_shards_and_what_lies_beside_them(tmp_path: Path) -> None:
    """Only the files that the index names are read; a companion or a copy beside them is not."""
    folder = save_checkpoint(tmp_path, max_shard_size="40KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    (folder / "._model-00001-of-00003.safetensors").write_bytes(b"\0\x05\x16\x07Mac OS X")
    (folder / "consolidated.safetensors").write_bytes(b"not read")
    check(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert read_card(folder).parameters == index["metadata"]["total_parameters"]
