"""Vocabularies cut to what corpora use: the same tokens for these, the same model, any text."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from models.downscale.vocabulary import cut_vocabulary
from models.errors import BaseError
from models.pool import load_pool
from tests.models.downscale.test_pipeline import changed
from tests.models.downscale.tiny_models import run, tiny_model, tiny_recipe

WORDS = "the law of the sea and the lawless seafarers of the seven seas, 1997 and 2024; übers Meer"
NUM_TOKENS = 96
ENDS = (0, 1)


def by_bytes():
    """Byte pairs over bytes as characters (GPT-2, Qwen, SmolLM2)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(ENDS) + len(alphabet) + 40
    return train(tokenizer, size, initial_alphabet=alphabet)


def with_bytes_to_fall_back_on():
    """Byte pairs over characters, with bytes for unknown ones (Llama 2, Mistral, Gemma)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Metaspace(), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = train(tokenizer, len(ENDS) + len(special) + 70, special_tokens=[*special])
    state = json.loads(trained.to_str())  # bytes are no words of a text
    kept = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps({**state, "added_tokens": kept}))


def train(tokenizer, vocab_size, *, special_tokens=(), **settings):
    """Trained on WORDS, with a beginning and an end, and the former before each text."""
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>", *special_tokens], **settings
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def fast(tokenizer):
    """The tokenizer as transformers has it."""
    ends = {"bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template="x", **ends)


def model_for(tokenizer, *, tied=True):
    """A tiny model with a row for each token and a few to spare."""
    model = tiny_model("llama", tied=tied)
    model.resize_token_embeddings(len(tokenizer) + 7)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    model.config.bos_token_id, model.config.eos_token_id = ENDS
    model.config.pad_token_id = None
    model.generation_config.eos_token_id = [1, 0]
    return model


def cut(model, tokenizer, texts, folder):
    """Cut both to what `texts` use; returns them as they are read again, and new ids by old."""
    used = {token for text in texts for token in tokenizer(text)["input_ids"]}
    new_ids = cut_vocabulary(copy.deepcopy(model), tokenizer, used, folder)
    return (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
        new_ids,
    )


@pytest.mark.parametrize("make", [by_bytes, with_bytes_to_fall_back_on])
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_what_was_used_stays_as_it_was_and_all_else_is_still_written(make, data, tmp_path_factory):
    """Texts that were counted become the same tokens, others decode to themselves as before."""
    tokenizer = fast(make())
    words = st.lists(st.sampled_from(WORDS.split()), min_size=1, max_size=6).map(" ".join)
    texts = data.draw(st.lists(words, min_size=1, max_size=3))
    folder = tmp_path_factory.mktemp("cut")
    _, smaller, new_ids = cut(model_for(tokenizer), tokenizer, texts, folder)
    assert len(smaller) == len(new_ids) < len(tokenizer)
    assert list(new_ids) == sorted(new_ids)
    for text in texts:
        assert smaller(text)["input_ids"] == [new_ids[t] for t in tokenizer(text)["input_ids"]]
    other = data.draw(st.one_of(words, st.text(max_size=20)))
    ids, before = smaller(other)["input_ids"], tokenizer(other)["input_ids"]
    assert len(ids) >= len(before)
    assert smaller.decode(ids) == tokenizer.decode(before)
    assert smaller.convert_ids_to_tokens(ids[:1]) == ["<s>"]


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_says_what_it_said_of_what_remains(tied, tmp_path):
    """Logits are those of the whole model; ids in its settings are the new ones."""
    tokenizer = fast(by_bytes())
    model = model_for(tokenizer, tied=tied)
    smaller, fewer, new_ids = cut(model, tokenizer, ["the seven seas"], tmp_path)
    ids = tokenizer("the seven seas", return_tensors="pt")["input_ids"]
    cut_ids = fewer("the seven seas", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        whole, part = model(ids).logits, smaller(cut_ids).logits
    assert part.shape[-1] == smaller.config.vocab_size == len(new_ids)
    torch.testing.assert_close(part, whole[..., list(new_ids)])
    assert smaller.config.eos_token_id == fewer.eos_token_id == new_ids[1]
    assert smaller.generation_config.eos_token_id == [new_ids[1], new_ids[0]]
    assert smaller.config.tie_word_embeddings == tied


def test_an_end_that_is_a_token_of_text_stays_one(tmp_path):
    """Settings may name tokens that no corpus uses and that are not special."""
    tokenizer = fast(by_bytes())
    model, last = model_for(tokenizer), len(tokenizer) - 1
    model.config.eos_token_id, model.generation_config.eos_token_id = last, [1, last]
    smaller, fewer, new_ids = cut(model, tokenizer, ["sea"], tmp_path)
    assert smaller.config.eos_token_id == new_ids[last]
    assert smaller.generation_config.eos_token_id == [new_ids[1], new_ids[last]]
    assert fewer.convert_ids_to_tokens(new_ids[last]) == tokenizer.convert_ids_to_tokens(last)


def test_spaces_are_written_where_no_corpus_has_any(tmp_path):
    """Where bytes stand in for characters, the mark of a space is none of these."""
    tokenizer = fast(with_bytes_to_fall_back_on())
    _, fewer, _ = cut(model_for(tokenizer), tokenizer, [""], tmp_path)
    assert fewer.decode(fewer("the sea")["input_ids"], skip_special_tokens=True) == "the sea"


def test_what_cannot_be_cut_is_named(tmp_path):
    """Tokenizers of other kinds, and settings that name tokens in other ways."""
    tokenizer = fast(by_bytes())
    model = model_for(tokenizer)
    model.generation_config.suppress_tokens = [5]
    with pytest.raises(BaseError, match=r"base\.vocabulary: 'used' .* suppress_tokens; allowed is"):
        cut_vocabulary(model, tokenizer, {1}, tmp_path)
    model.generation_config.suppress_tokens = None
    words = fast(Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="<s>")))
    with pytest.raises(BaseError, match=r"another kind \(WordLevel\) than plain byte pairs"):
        cut_vocabulary(model, words, {1}, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_pool_with_the_vocabulary_of_its_corpora(tmp_path):
    """All members have the smaller one, and are served and fused as ever."""
    recipe = changed(tiny_recipe(tmp_path), base={"vocabulary": "used"})
    lines = run(recipe, tmp_path / "pool")
    [told] = [line for line in lines if line.startswith("vocabulary: ") and "tokens" in line]
    left = int(told.split()[1].replace(",", ""))
    sizes = {
        json.loads(file.read_text())["vocab_size"] for file in tmp_path.glob("pool/*/config.json")
    }
    assert sizes == {left}
    assert {"auto", "cascade", "fused", "best-of"} <= set(load_pool(tmp_path / "pool").policies)
