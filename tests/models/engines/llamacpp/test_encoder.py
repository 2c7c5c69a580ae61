"""Encoders as GGUF files: small random BERTs, held to transformers' own arithmetic."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import BertWordPieceTokenizer

from models.engines.base import Chunk, Encoding
from models.errors import ContextOverflow, RequestError
from models.spec import EngineSpec
from models.tokenizer_json import read_tokenizer
from tests.models.engines import encoders
from tests.tiny_bert import SPECIAL, make_bert

pytest.importorskip("xllamacpp", reason="the extra llamacpp is not installed")
gguf = pytest.importorskip("gguf")

WORDS = [*SPECIAL, "the", "cat", "##s", "dog", "a", "sat", ","]
TEXTS = ("The cats sat", "a dog, a cat", "sat")
CONTEXT_TOKENS = 12
# What llama.cpp calls the parts of a layer.
_PARTS = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def tiny_bert(labels: int | None = None) -> Any:
    """Return a tiny random BERT."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
    shape |= {"max_position_embeddings": CONTEXT_TOKENS, "initializer_range": 0.2}
    return make_bert(len(WORDS), labels=labels, seed=7, **shape)


def write_gguf(file: Path, model: Any, pooling: int) -> Path:
    """Write `model` as llama.cpp's converter does."""
    bert = getattr(model, "bert", model)
    config = model.config
    writer = gguf.GGUFWriter(file, "bert")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_uint32("bert.pooling_type", pooling)
    writer.add_token_type_count(2)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")
    writer.add_token_list([_phantom(word) for word in WORDS])
    writer.add_token_types([3 if word.startswith("[") else 1 for word in WORDS])
    writer.add_token_scores([-1000.0] * len(WORDS))
    for add, word in (
        (writer.add_pad_token_id, "[PAD]"),
        (writer.add_unk_token_id, "[UNK]"),
        (writer.add_bos_token_id, "[CLS]"),
        (writer.add_sep_token_id, "[SEP]"),
        (writer.add_mask_token_id, "[MASK]"),
    ):
        add(WORDS.index(word))
    embeddings = bert.embeddings
    tensors = {
        "token_embd.weight": embeddings.word_embeddings.weight,
        "token_types.weight": embeddings.token_type_embeddings.weight,
        "position_embd.weight": embeddings.position_embeddings.weight,
        "token_embd_norm.weight": embeddings.LayerNorm.weight,
        "token_embd_norm.bias": embeddings.LayerNorm.bias,
    }
    for index, layer in enumerate(bert.encoder.layer):
        for part, its in _PARTS.items():
            for kind, value in layer.get_submodule(part).named_parameters():
                tensors[f"blk.{index}.{its}.{kind}"] = value
    if bert is not model:
        for part, its in ((bert.pooler.dense, "cls"), (model.classifier, "cls.output")):
            tensors |= {f"{its}.{kind}": value for kind, value in part.named_parameters()}
    for name, value in tensors.items():
        writer.add_tensor(name, value.detach().float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _phantom(word: str) -> str:
    if word.startswith("["):
        return word
    return word[2:] if word.startswith("##") else f"▁{word}"


def told(file: Path, *asked: Encoding, **options: Any) -> list[Any]:
    """Return what an engine tells of each of `asked`."""
    spec = EngineSpec(name="e", kind="llamacpp", options={"num_slots": 2, **options})
    return encoders.told(spec, file, *asked)


@pytest.mark.parametrize(("pooling", "name"), [(1, "mean"), (2, "cls")])
def test_vectors_are_transformers(tmp_path: Path, pooling: int, name: str) -> None:
    """Of texts and of their ids alike, pooled as the file says; similarity is the angle."""
    model = tiny_bert()
    vocabulary = BertWordPieceTokenizer({word: index for index, word in enumerate(WORDS)})
    ids = tuple(tuple(vocabulary.encode(text).ids) for text in TEXTS)
    rows = []
    for row_ids in ids:
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([row_ids])).last_hidden_state[0]
        row = hidden[0] if name == "cls" else hidden.mean(0)
        rows.append((row / row.norm()).numpy())
    file = write_gguf(tmp_path / "m.gguf", model, pooling)
    long = "cat " * 40
    texts, tokens, ranked, refused, cut = told(
        file,
        Encoding(inputs=TEXTS),
        Encoding(inputs=ids),
        Encoding(inputs=TEXTS[1:], query=TEXTS[0], cut=True),
        Encoding(inputs=(long,)),
        Encoding(inputs=(long, "cat " * (CONTEXT_TOKENS - 2)), cut=True),
    )
    for one in (texts, tokens):
        assert isinstance(one, Chunk)
        assert one.rows is not None
        np.testing.assert_allclose(one.rows, rows, atol=2e-3)
        assert one.prompt_tokens == sum(map(len, ids))
    assert isinstance(ranked, Chunk)
    assert ranked.rows is not None
    np.testing.assert_allclose(ranked.rows[:, 0], [rows[1] @ rows[0], rows[2] @ rows[0]], atol=2e-3)
    assert isinstance(refused, ContextOverflow)
    assert isinstance(cut, Chunk)
    assert cut.rows is not None
    np.testing.assert_allclose(cut.rows[0], cut.rows[1], atol=1e-5)


def test_a_cross_encoder_scores_pairs(tmp_path: Path) -> None:
    """A file that ranks tells the model's score of query and text, as a probability, and no vector.

    llama.cpp has one kind of token, and one separator in a pair.
    """
    model = tiny_bert(labels=1)
    file = write_gguf(tmp_path / "m.gguf", model, 4)
    tokenizer = read_tokenizer(file)
    begin, end = WORDS.index("[CLS]"), WORDS.index("[SEP]")
    query = tokenizer.encode("a cat", add_special_tokens=False).ids
    wanted = []
    for text in TEXTS:
        ids = [begin, *query, end, *tokenizer.encode(text, add_special_tokens=False).ids]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits
        wanted.append(float(logits[0, 0].sigmoid()))
    scores, long, vectors = told(
        file,
        Encoding(inputs=TEXTS, query="a cat", cut=True),
        Encoding(inputs=("cat " * 40,), query="a cat", cut=True),
        Encoding(inputs=TEXTS),
    )
    assert isinstance(scores, Chunk)
    assert scores.rows is not None
    np.testing.assert_allclose(scores.rows[:, 0], wanted, atol=2e-3)
    assert isinstance(long, Chunk)
    assert isinstance(vectors, RequestError)


def test_the_pool_file_may_say_how_vectors_are_pooled(tmp_path: Path) -> None:
    """A file that says nothing writes answers, unless the option `pooling` makes it an encoder."""
    file = write_gguf(tmp_path / "m.gguf", tiny_bert(), 0)
    [one] = told(file, Encoding(inputs=TEXTS), pooling="mean")
    assert isinstance(one, Chunk)
    [other] = told(write_gguf(tmp_path / "n.gguf", tiny_bert(), 1), Encoding(inputs=TEXTS))
    assert isinstance(other, Chunk)
    assert one.rows is not None
    np.testing.assert_allclose(one.rows, other.rows, atol=1e-5)
