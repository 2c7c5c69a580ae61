"""A transformer as scorer: what it computes, and which folders it refuses."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from policies.cascade.base import Attempt, BatchScorer, Scorer, build_scorer
from policies.cascade.transformer import Transformer
from policies.errors import PolicyError
from policies.plan import Answer
from tests.tiny_bert import save_bert

WORDS = ["add", "7", "and", "8", "what", "is", "the", "colour", "of", "snow", "white", "blue"]
PAIRS = [
    ("what is 7 and 8", "blue 8"),
    ("what is the colour of snow", "blue"),
    ("the colour of snow", ""),
    ("", "white"),
    ("add \ud800 7", "🦈 white"),
]


def checkpoint(folder: Path, labels: int) -> Path:
    """Write a tiny BERT classifier with random weights and its tokenizer (seed 0)."""
    shape = {"max_position_embeddings": 64, "initializer_range": 0.5}
    return save_bert(folder, WORDS, labels=labels, **shape)


def attempt(query: str, answer: str) -> Attempt:
    """Return an attempt whose log-probabilities say nothing."""
    return Attempt(
        query=query,
        plan=Answer(members=("a",)),
        answer=answer,
        logprob_mean=0.0,
        logprob_min=0.0,
        num_tokens=1,
    )


def directly(folder: Path, query: str, answer: str) -> float:
    """Return what transformers computes for one pair, without a batch."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    def clean(text: str) -> str:
        return text.encode("utf-8", "replace").decode()

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        inputs = tokenizer([clean(query)], [clean(answer)], return_tensors="pt")
        logits = model(**inputs).logits[0]
    return float(logits.sigmoid() if len(logits) == 1 else logits.softmax(0)[1])


@pytest.mark.parametrize("num_labels", [1, 2])
def test_scores_are_the_checkpoints(tmp_path: Path, num_labels: int) -> None:
    """One label gives its sigmoid, two the second's share, alone as in a batch (seed 0)."""
    checkpoint(tmp_path, num_labels)
    scorer = build_scorer({"kind": "transformer", "path": tmp_path.name}, folder=tmp_path.parent)
    assert isinstance(scorer, Scorer)
    assert isinstance(scorer, BatchScorer)
    expected = [directly(tmp_path, *pair) for pair in PAIRS]
    attempts = [attempt(*pair) for pair in PAIRS]
    assert scorer.score_batch(attempts) == pytest.approx(expected, abs=1e-5)
    assert [scorer.score(one) for one in attempts] == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01


def test_long_texts_are_cut_and_threads_may_share(tmp_path: Path) -> None:
    """A text beyond the model's positions is cut, and threads get the scores of one alone."""
    scorer = Transformer(checkpoint(tmp_path, 1))
    attempts = [attempt("the colour of snow " * size, "white") for size in (1, 10, 1000)] * 4
    alone = [scorer.score(one) for one in attempts]
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(scorer.score, attempts)) == pytest.approx(alone, abs=1e-6)


def test_a_model_without_padding_scores_one_by_one(tmp_path: Path) -> None:
    """Classifiers on decoders often have no padding token, and refuse batches (seed 0)."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification

    checkpoint(tmp_path, 2)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS) + 5,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=64,
        initializer_range=0.5,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=None,
    )
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    expected = [directly(tmp_path, *pair) for pair in PAIRS]
    scorer = Transformer(tmp_path)
    assert scorer.score_batch([attempt(*p) for p in PAIRS]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "bert"}, "kind: 'bert' is unknown; allowed are transformer"),
        ({"path": "/nowhere"}, "/nowhere is not a Hugging Face model's folder"),
        ({"path": 3}, "transformer.path: 3 is refused: it should be a valid string"),
        (
            {"max_tokens": "9"},
            "transformer.max_tokens: '9' is refused: it should be a valid integer",
        ),
        ({"max_tokens": 2}, "max_tokens: 2 is refused: it should be greater than or equal to 8"),
        ({"device": "cpu"}, "the key 'device' is unknown; allowed are path, max_tokens"),
    ],
)
def test_mistakes_in_a_specification_are_named(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    """Each wrong key or value is refused when the pool loads."""
    (tmp_path / "model.safetensors").touch()
    config = {"architectures": ["BertForSequenceClassification"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    build_scorer({"kind": "transformer", "path": str(tmp_path)}, folder=Path())
    with pytest.raises(PolicyError, match=message):
        build_scorer({"kind": "transformer", "path": str(tmp_path), **change}, folder=Path())


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        ({"architectures": ["BertModel"]}, "model.safetensors", "no sequence-classification"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "model.safetensors", "has 3 classes"),
        ({}, "pytorch_model.bin", "no weights in safetensors"),
    ],
)
def test_unfit_checkpoints_are_refused(
    tmp_path: Path, config: dict[str, object], weights: str, message: str
) -> None:
    """Neither another head, nor more classes, nor pickled weights are taken."""
    (tmp_path / weights).touch()
    whole = {"architectures": ["BertForSequenceClassification"], **config}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(PolicyError, match=message):
        build_scorer({"kind": "transformer", "path": str(tmp_path)}, folder=Path())
