"""What a checkpoint says is read, or refused by name."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from models.card import read_card
from models.engines.base import Structure
from models.engines.registry import create_engine
from models.engines.stacked.architecture import read_architecture, read_stack
from models.engines.stacked.model import frequencies
from models.errors import PoolError, RequestError
from models.spec import EngineSpec, Model, ModelSpec
from tests.models.engines.stacked.tiny import (
    answer,
    build_engine,
    edit_config,
    request,
    save_checkpoint,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}


def longrope(long: list[float]) -> dict[str, Any]:
    """With short factors that change nothing."""
    return {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": long}


def test_llama3_frequencies_are_those_of_transformers(tmp_path: Path) -> None:
    """The rescaled rotary frequencies agree to float32 precision."""
    folder = save_checkpoint(tmp_path, "llama3-rope", head_dim=64)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(folder), "cpu")
    architecture = read_architecture(read_card(folder))
    rotary = architecture.layers[0].rotary
    assert rotary is not None
    ours = frequencies(rotary, architecture.context_tokens)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("llama", {"model_type": "gpt2"}, "model_type 'gpt2' is not supported; allowed are llama"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type 'longrope'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3"}}, "factor None is not allowed"),
        ("llama", {"rope_parameters": {"rope_theta": "1"}}, "rope_theta '1' is not allowed"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        (
            "phi3",
            {"rope_scaling": {"partial_rotary_factor": 0.2}},
            "partial_rotary_factor 0.2 .* that rotates pairs",
        ),
        ("phi3", {"rope_scaling": {"partial_rotary_factor": "all"}}, "partial_rotary_factor 'all'"),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope"}},
            "short_factor must be a list of 8 numbers",
        ),
        ("phi3", {"rope_scaling": {"type": "linear"}}, "rope_type 'linear' .* default, longrope"),
        *(
            ("llama", {"rope_parameters": {**LLAMA3, key: value}}, f"{key} .* is not allowed")
            for key in ("factor", "low_freq_factor", "high_freq_factor", "rope_theta")
            for value in (math.inf, math.nan, 1e300, 1e-300, 10**400, -1, 0, [1.0], "2", None)
        ),
        (
            "llama",
            {"rope_parameters": {**LLAMA3, "high_freq_factor": 0.5}},
            "high_freq_factor 0.5 is not allowed; one above low_freq_factor 1.0",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1}},
            "rope_theta 1.0 is not allowed with yarn",
        ),
        ("phi3", {"rope_scaling": longrope([math.inf] * 8)}, "long_factor inf is not allowed"),
        ("phi3", {"rope_scaling": longrope([1] * 7)}, "long_factor must be a list of 8 numbers"),
        (
            "phi3",
            {"rope_scaling": longrope([1] * 8), "original_max_position_embeddings": 1},
            "original_max_position_embeddings 1 is not allowed with longrope",
        ),
        (
            "qwen2",
            {"use_sliding_window": "no", "layer_types": ...},
            "use_sliding_window 'no' is not allowed",
        ),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": "1",
                "layer_types": ...,
            },
            "max_window_layers '1' is not allowed",
        ),
        ("llama", {"rms_norm_eps": True}, "rms_norm_eps True is not allowed"),
        ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings 'no' is not allowed"),
        ("llama", {"num_hidden_layers": 2.0}, "num_hidden_layers 2.0 is not allowed"),
        ("llama", {"eos_token_id": [1, "2"]}, "eos_token_id .* is not allowed"),
        ("qwen2", {"is_causal": False}, "is_causal False is not supported"),
        ("llama", {"transformers_weights": "ema.safetensors"}, "transformers_weights 'ema"),
        (
            "llama",
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
            "layer_types .* is not supported for llama",
        ),
        ("mistral", {"sliding_window": 0}, "sliding_window 0 is not allowed"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types .* must have one of"),
        ("qwen2", {"layer_types": [[], "full_attention"]}, "layer_types .* must have one of"),
        ("llama", {"num_hidden_layers": 10**30}, "num_hidden_layers 1000+ is not allowed"),
        ("llama", {"num_attention_heads": 10**30}, "num_attention_heads 1000+ is not allowed"),
        (
            "gemma3_text",
            {"rope_parameters": {"full_attention": "x"}},
            "the rotary parameters 'x' are not a mapping",
        ),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": None},
            "layer_types has sliding_attention, but sliding_window is null",
        ),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
            "layer_types has sliding_attention, but use_sliding_window is false",
        ),
    ],
)
def test_refuses_what_it_does_not_compute(
    kind: str, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    """A key that would change the result is refused with its file, name and value."""
    folder = save_checkpoint(tmp_path, kind)
    edit_config(folder, **changes)
    with pytest.raises(PoolError, match=rf"config\.json: {named}"):
        read_architecture(read_card(folder))


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        (
            "llama",
            {"num_key_value_heads": 4},
            r"k_proj\.weight has the shape \[32, 64\].*\[64, 64\]",
        ),
        ("llama", {"num_key_value_heads": 1}, r"k_proj\.weight has the shape"),
        ("llama", {"vocab_size": 310}, r"embed_tokens\.weight has the shape \[320, 64\]"),
        ("llama", {"intermediate_size": 128}, r"gate_proj\.weight has the shape"),
        ("llama", {"hidden_size": 32, "head_dim": 16}, r"embed_tokens\.weight has the shape"),
        ("llama", {"num_hidden_layers": 3}, r"model\.layers\.2\.\S+ is missing"),
        ("llama", {"num_hidden_layers": 1}, r"tensor model\.layers\.1\.\S+ is none that"),
        ("llama", {"attention_bias": False}, r"the bias model\.layers\.0\.\S+ is none that"),
        ("llama", {"model_type": "mistral"}, r"the bias model\.layers\.0\.\S+ is none that"),
        ("llama", {"mlp_bias": True}, r"model\.layers\.0\.mlp\.\S+bias is missing"),
        ("qwen3", {"head_dim": ...}, r"q_norm\.weight has the shape \[32\].*\[128\]"),
        ("mistral", {"tie_word_embeddings": True}, None),  # a head of its own is used, as it is
    ],
)
def test_tensors_and_config_must_agree(
    kind: str, changes: dict[str, Any], named: str | None, tmp_path: Path
) -> None:
    """A tensor that is missing, of another shape or unknown to the config is named."""
    folder = save_checkpoint(tmp_path, kind)
    edit_config(folder, **changes)
    if named is None:
        read_architecture(read_card(folder))
        return
    with pytest.raises(PoolError, match=named):
        read_architecture(read_card(folder))


def test_a_folder_with_an_adapter_in_it_is_refused(tmp_path: Path) -> None:
    """transformers would serve what the adapter makes of the base that it names."""
    folder = save_checkpoint(tmp_path)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    with pytest.raises(PoolError, match=r"adapter_config\.json: transformers would serve the base"):
        read_architecture(read_card(folder))


def test_end_tokens(tmp_path: Path) -> None:
    """generation_config.json comes before config.json; the tokenizer's own end counts, too."""
    folder = save_checkpoint(tmp_path)
    (folder / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert read_card(folder).end_tokens == {3, 4}
    (folder / "generation_config.json").write_text('{"eos_token_id": [-1, 4, 5000]}')
    assert read_card(folder).end_tokens == {4}  # the others can never be said
    (folder / "generation_config.json").unlink()
    assert read_card(folder).end_tokens == {0}
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|user|>"}')
    assert read_card(folder).end_tokens == {0, 1}


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"eos_token": "<|im_end|>"}},
        {
            "tokenizer_config.json": {
                "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"},
                "added_tokens_decoder": {"300": {"content": "<|im_end|>", "special": True}},
            }
        },
        {"special_tokens_map.json": {"eos_token": "<|im_end|>"}},
        {
            "added_tokens.json": {"<|im_end|>": 300},
            "tokenizer_config.json": {"eos_token": "<|im_end|>"},
        },
    ],
)
def test_end_tokens_that_stand_beside_the_tokenizer(files: dict[str, Any], tmp_path: Path) -> None:
    """An end that other files add to tokenizer.json ends answers by the id that it has then."""
    folder = save_checkpoint(tmp_path)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.eos_token == "<|im_end|>"
    assert read_card(folder).end_tokens == {0, theirs.eos_token_id}


def test_members_need_one_architecture(tmp_path: Path) -> None:
    """A member with another norm or without biases is refused, naming its file and the fact."""
    folders = [save_checkpoint(tmp_path / name) for name in ("a", "b")]
    folders.append(save_checkpoint(tmp_path / "c", attention_bias=False))
    edit_config(folders[1], rms_norm_eps=0.5)
    for other, fact in ((1, "norm_eps is 0.5"), (2, "qkv_bias is False")):
        cards = [read_card(folders[0]), read_card(folders[other])]
        with pytest.raises(PoolError, match=rf"config\.json: members of a .* but its {fact}"):
            read_stack(cards)


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path: Path) -> None:
    """Both numbers are named when the engine starts."""
    engine = build_engine([save_checkpoint(tmp_path, vocab_size=250)])
    with pytest.raises(PoolError, match=r"the tokenizer has \d+ tokens, but .* vocab_size of 250"):
        answer(engine, request([5]))


def test_added_tokens_without_embeddings_are_refused_in_prompts_alone(tmp_path: Path) -> None:
    """As fine-tuning leaves them: a token for padding that nobody says, also held to a grammar."""
    folder = save_checkpoint(tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    num_tokens = read_card(folder).shape.vocab_size
    tokenizer.add_special_tokens([f"<pad {i}>" for i in range(num_tokens)])
    tokenizer.save(str(folder / "tokenizer.json"))
    engine = build_engine([folder])
    with pytest.raises(RequestError, match=f"outside of the vocabulary of {num_tokens}"):
        answer(engine, request([5, tokenizer.token_to_id("<pad 99>")]))
    plain = request([5], structure=Structure(kind="regex", text="[ab]{3}"), max_tokens=9)
    [chunks] = answer(engine, plain)
    assert re.fullmatch("[ab]{3}", "".join(chunk.text for chunk in chunks))


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    """An option that the engine does not know is named when the engine is made."""
    with pytest.raises(PoolError, match=r"engines\.tiny\.options: speed: unknown key"):
        build_engine([save_checkpoint(tmp_path)], speed=11)


def test_cuda_must_be_there(tmp_path: Path) -> None:
    """Asking for CUDA on a machine without it says so at start."""
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    spec = EngineSpec(name="tiny", kind="stacked", device="cuda")
    model = ModelSpec(name="m", engine="tiny", checkpoint=str(tmp_path))
    engine = create_engine(spec, [Model(spec=model, card=read_card(save_checkpoint(tmp_path)))])
    with pytest.raises(PoolError, match=r"engines\.tiny\.device: cuda is not there"):
        answer(engine, request([1]))
