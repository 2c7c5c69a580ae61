"""Encoders inside vLLM: small random BERTs, held to transformers' own arithmetic."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel

from models.engines.base import Encoding
from models.spec import EngineSpec
from tests.models.engines import encoders
from tests.tiny_bert import save_bert

WORDS = ["the", "cat", "dog", "a", "sat", "on", "mat"]
TEXTS = ("the cat sat", "a dog", "the the the cat dog sat on a mat", "mat")


def write_encoder(folder: Path, *, cross: bool) -> Path:
    """Write a tiny random BERT, of vectors or of scores."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
    shape |= {"max_position_embeddings": 32, "initializer_range": 0.2}
    return save_bert(folder, WORDS, labels=1 if cross else None, seed=7, **shape)


def told(folder: Path, *asked: Encoding) -> list[Any]:
    """Return what an engine tells of each of `asked`."""
    options = {"engine_args": {"enforce_eager": True}, "num_threads": 1}
    spec = EngineSpec(name="e", kind="vllm", dtype="float32", options=options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        return encoders.told(spec, folder, *asked)


def test_vectors_are_transformers(tmp_path: Path) -> None:
    """Of texts and of their ids, the mean over all tokens, of length one; many at once."""
    folder = write_encoder(tmp_path / "m", cross=False)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder)
    wanted = []
    for text in TEXTS:
        with torch.no_grad():
            hidden = model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        wanted.append((hidden.mean(0) / hidden.mean(0).norm()).numpy())
    ids = tuple(tuple(tokenizer(text)["input_ids"]) for text in TEXTS)
    texts, tokens, ranked = told(
        folder,
        Encoding(inputs=TEXTS),
        Encoding(inputs=ids),
        Encoding(inputs=TEXTS[1:], query=TEXTS[0], cut=True),
    )
    for one in (texts, tokens):
        np.testing.assert_allclose(one.rows, wanted, atol=1e-4)
        assert one.prompt_tokens == sum(map(len, ids))
    np.testing.assert_allclose(ranked.rows[:, 0], np.stack(wanted[1:]) @ wanted[0], atol=1e-4)


def test_a_cross_encoder_scores_pairs(tmp_path: Path) -> None:
    """Its scores are transformers' own for query and text together."""
    folder = write_encoder(tmp_path / "m", cross=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        pairs = [tokenizer("a cat", text, return_tensors="pt") for text in TEXTS]
        wanted = [float(model(**pair).logits[0, 0].sigmoid()) for pair in pairs]
    [scores] = told(folder, Encoding(inputs=TEXTS, query="a cat", cut=True))
    np.testing.assert_allclose(scores.rows[:, 0], wanted, atol=1e-4)
