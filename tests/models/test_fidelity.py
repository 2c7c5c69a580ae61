"""What is served is what transformers computes, over the grid that real checkpoints vary.

Tiny random checkpoints, saved by transformers and read by us: the log-probabilities of the first
step and the greedy tokens of the next must be its own.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from models.card import read_card
from models.tokenizer import CheckpointTokenizer
from tests.models.engines.stacked.tiny import (
    answer,
    build_engine,
    build_tokenizer,
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


def longrope(num_pairs: int, **more: Any) -> dict[str, Any]:
    """What pairs' frequencies are divided by, in short texts and in long ones."""
    short, long = ([step**pair for pair in range(num_pairs)] for step in (1.1, 1.7))
    return {"short_factor": short, "long_factor": long, **more}


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
    "yarn, a ramp that falls": (
        "llama",
        {},
        {"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 32, "truncate": False}},
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
    "a window": ("mistral", {"sliding_window": 16}, {}),
    "a window in some of mistral's": (
        "mistral",
        {"sliding_window": 16},
        {"layer_types": ["full_attention", "sliding_attention"]},
    ),
    "a window in later layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        {},
    ),
    "a window in some layers": (
        "qwen3",
        {
            "use_sliding_window": True,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        {},
    ),
    "phi3": ("phi3", {"sliding_window": 40}, {}),
    "phi3, plain": ("phi3", {"num_key_value_heads": 4}, {"num_key_value_heads": ...}),
    "phi3, part of each head": (
        "phi3",
        {"num_key_value_heads": 1},
        {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_type": "default"}},
    ),
    "phi3, longrope": (
        "phi3",
        {},
        {
            "rope_parameters": longrope(8, rope_type="longrope", rope_theta=500.0),
            "original_max_position_embeddings": 48,
        },
    ),
    "phi4": (
        "phi3",
        {"tie_word_embeddings": True},
        {
            "rope_parameters": ...,
            "rope_theta": 300.0,
            "partial_rotary_factor": 0.75,
            "rope_scaling": longrope(6, type="longrope", factor=None, attention_factor=1.3),
            "original_max_position_embeddings": 64,
        },
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "attention_bias": True, "mlp_bias": True}, {}),
    "smollm3, a window": (
        "smollm3",
        {
            "num_hidden_layers": 4,
            "no_rope_layers": [1, 0, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 16,
        },
        {},
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.05,
            "logits_scaling": 5.0,
            "attention_bias": True,
            "mlp_bias": True,
        },
        {},
    ),
    "granite, tied": (
        "granite",
        {"tie_word_embeddings": True, "embedding_multiplier": 2.0},
        {"attention_multiplier": 0.1, "rope_scaling": YARN},
    ),
    "olmo2": ("olmo2", {"attention_bias": True}, {}),
    "olmo2, grouped": ("olmo2", {"num_key_value_heads": 1}, {"rms_norm_eps": ...}),
    "gemma": ("gemma", {"head_dim": 32, "attention_bias": True}, {"hidden_act": ...}),
    "gemma, its first files": ("gemma", {"head_dim": 32}, {"hidden_act": "gelu"}),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 7,
            "head_dim": 32,
            "query_pre_attn_scalar": 20,
            "sliding_window": 16,
            "final_logit_softcapping": 3.0,
        },
        {},
    ),
    "gemma3, older spelling": (
        "gemma3_text",
        {"num_hidden_layers": 3, "head_dim": 16, "sliding_window": 24},
        {
            "layer_types": ...,
            "sliding_window_pattern": 2,
            "rope_parameters": ...,
            "rope_theta": 5000.0,
            "rope_local_base_freq": 300.0,
            "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        },
    ),
    "swish": ("llama", {}, {"hidden_act": "swish"}),
    "a padded vocabulary": ("llama", {"vocab_size": 384}, {}),
    "key/value heads by default": (
        "mistral",
        {"num_attention_heads": 16, "num_key_value_heads": 8},
        {"num_key_value_heads": ...},
    ),
    "heads of 128 by default": ("qwen3", {"head_dim": 128}, {"head_dim": ...}),
}


def check(folder: Path, *, tolerance: float = 2e-4, **options: Any) -> None:
    """Compare the first step's ten best log-probabilities, and 24 greedy tokens."""
    reference = load_reference(folder)
    engine = build_engine([folder], **options)
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


def test_longrope_within_the_first_context(tmp_path: Path) -> None:
    """An engine of no longer texts takes what transformers takes of them, and ends them there."""
    folder = save_checkpoint(tmp_path, "phi3")
    rope = longrope(8, rope_type="longrope", factor=9.0)
    edit_config(folder, rope_parameters=rope, original_max_position_embeddings=128)
    check(folder, context_tokens=128)
    engine = build_engine([folder], context_tokens=len(PROMPT) + 10)
    [chunks] = answer(engine, request(PROMPT, max_tokens=24, ignore_eos=True))
    assert len(token_ids(chunks)) == 10


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


@pytest.mark.parametrize("case", ["a window in some layers", "gemma3", "smollm3", "olmo2"])
def test_many_at_once_and_in_pieces(case: str, tmp_path: Path) -> None:
    """Prompts read in pieces, and lanes that decode together, give transformers' tokens."""
    kind, options, changes = GRID[case]
    folders = [save_checkpoint(tmp_path / f"{i}", kind, seed=i, **options) for i in range(2)]
    for folder in folders:
        edit_config(folder, **changes)
    prompts = [PROMPT[:5], PROMPT[:33], PROMPT]
    wanted = [
        request(prompt, (f"m{member}",), max_tokens=40, ignore_eos=True)
        for prompt in prompts
        for member in range(2)
    ]
    answers = answer(build_engine(folders, step_rows=16), *wanted)
    references = [load_reference(folder) for folder in folders]
    for number, chunks in enumerate(answers):
        tokens = torch.tensor([prompts[number // 2]])
        with torch.no_grad():
            expected = references[number % 2].generate(
                tokens, max_new_tokens=40, min_new_tokens=40, do_sample=False, eos_token_id=None
            )
        assert token_ids(chunks) == expected[0, tokens.shape[1] :].tolist()


def byte_level() -> Tokenizer:
    """As GPT-2, Qwen and Llama 3 have."""
    return build_tokenizer()


def sentence_piece() -> Tokenizer:
    """As Llama 2 and Mistral have: spaces are letters, unknown characters are bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *"abcdeé", "ab", "▁a", "▁ab"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def unigram() -> Tokenizer:
    """As T5's descendants have: the likeliest pieces, with a score each."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((c, -3.0) for c in "abcdeé,")]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("▁ab", -4.0), ("cd", -4.0)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("family", [byte_level, sentence_piece, unigram])
def test_three_families_of_tokenizers(family: Callable[[], Tokenizer], tmp_path: Path) -> None:
    """An answer's text is what transformers decodes of its tokens: added tokens that are not
    special are text, special ones and rows without a token are nothing."""
    folder = save_checkpoint(tmp_path)
    tokenizer = family()
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    tokenizer.add_special_tokens([AddedToken("<|sep|>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    written = "é ab<think>cd<|sep|> a, abé"
    ids = theirs(written, add_special_tokens=False)["input_ids"]
    [*answers] = answer(
        build_engine([folder]),
        *(request([5], max_tokens=1, ignore_eos=True, logit_bias={i: 100.0}) for i in ids),
        request([5], max_tokens=1, ignore_eos=True, logit_bias={319: 100.0}),
    )
    assert [token_ids(chunks) for chunks in answers[:-1]] == [[i] for i in ids]
    raw = b"".join(token.raw for chunks in answers for chunk in chunks for token in chunk.tokens)
    assert raw.decode() == theirs.decode(ids, skip_special_tokens=True)
    assert CheckpointTokenizer(folder).decode(ids) == raw.decode()
