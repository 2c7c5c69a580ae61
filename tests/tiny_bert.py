"""Small random BERTs with their tokenizers, for all tests that want an encoder or a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_bert(num_words: int, *, labels: int | None = None, seed: int = 0, **shape: Any) -> Any:
    """Return one over `num_words`, special ones included: a classifier if it has `labels`."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(**{"vocab_size": num_words, "hidden_size": 16, **small, **shape})
    torch.manual_seed(seed)
    if labels is None:
        return BertModel(config).eval()
    config.num_labels = labels
    return BertForSequenceClassification(config).eval()


def save_bert(folder: Path, words: Sequence[str], **how: Any) -> Path:
    """Write one that knows `words`, made as `make_bert` is told, as transformers does."""
    from transformers import BertTokenizerFast

    vocabulary = [*SPECIAL, *words]
    folder.mkdir(parents=True, exist_ok=True)
    make_bert(len(vocabulary), **how).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder
