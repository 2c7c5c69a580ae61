"""Encoders inside vLLM: small random BERTs, held to transformers' own arithmetic."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel

from models.card import read_card
from models.engines.base import Chunk, Encoding, GenerationRequest
from models.engines.registry import create_engine, engine_traits
from models.spec import EngineSpec, Model, ModelSpec
from tests.tiny_bert import save_bert

WORDS = ["the", "cat", "dog", "a", "sat", "on", "mat"]
TEXTS = ("the cat sat", "a dog", "the the the cat dog sat on a mat", "mat")


def write_encoder(folder: Path, *, cross: bool) -> Path:
    """Write a tiny random BERT, of vectors or of scores."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96}
    shape |= {"max_position_embeddings": 32, "initializer_range": 0.2}
    return save_bert(folder, WORDS, labels=1 if cross else None, seed=7, **shape)


def told(folder: Path, *asked: Encoding) -> list[Chunk]:
    """Return what an engine tells of each of `asked`."""
    options = {"engine_args": {"enforce_eager": True}, "num_threads": 1}
    spec = EngineSpec(name="e", kind="vllm", dtype="float32", options=options)
    source = ModelSpec(name="m", engine="e", checkpoint=str(folder))
    model = Model(spec=source, card=read_card(folder), tokenizer=folder)
    assert engine_traits(spec, [model]).encodes.keys() == {"m"}

    async def run() -> list[Chunk]:
        engine = create_engine(spec, [model])
        await engine.start()
        try:
            requests = [
                GenerationRequest(request_id=str(i), prompt_tokens=(), members=("m",), encoding=one)
                for i, one in enumerate(asked)
            ]
            return await asyncio.gather(*(anext(engine.generate(one)) for one in requests))
        finally:
            await engine.stop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        return asyncio.run(run())


def _rows(chunk: Chunk) -> Any:
    assert chunk.rows is not None
    return chunk.rows


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
        np.testing.assert_allclose(_rows(one), wanted, atol=1e-4)
        assert one.prompt_tokens == sum(map(len, ids))
    np.testing.assert_allclose(_rows(ranked)[:, 0], np.stack(wanted[1:]) @ wanted[0], atol=1e-4)


def test_a_cross_encoder_scores_pairs(tmp_path: Path) -> None:
    """Its scores are transformers' own for query and text together."""
    folder = write_encoder(tmp_path / "m", cross=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        pairs = [tokenizer("a cat", text, return_tensors="pt") for text in TEXTS]
        wanted = [float(model(**pair).logits[0, 0].sigmoid()) for pair in pairs]
    [scores] = told(folder, Encoding(inputs=TEXTS, query="a cat", cut=True))
    np.testing.assert_allclose(_rows(scores)[:, 0], wanted, atol=1e-4)
