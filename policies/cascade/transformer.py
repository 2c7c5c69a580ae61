"""A transformer scorer by path: any Hugging Face sequence classifier, no download.

This is FrugalGPT's own scorer (Chen et al. 2023, section 3, a DistilBERT over query and answer),
as an alternative to the learned one. torch and transformers are imported when the first answer is
scored, and only here. Milliseconds per answer instead of microseconds; every process that runs
plans holds the weights.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from scipy.special import expit

from policies.cascade.base import Attempt, ScorerKind
from policies.errors import PolicyError
from policies.kinds import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 16


class Transformer:
    """P(correct | query, answer) from a classifier of the pair (query, answer).

    `path` is the folder of a sequence-classification checkpoint in safetensors: with one label the
    score is its logit's sigmoid, with two the second one's softmax. A pair longer than
    `max_tokens` (or the model's own limit) loses the end of its longer text. Code in the folder is
    never run. Thread-safe: one batch computes at a time.
    """

    def __init__(self, path: Path | str, *, max_tokens: int = 512) -> None:
        folder = Path(path)
        config = _read_config(folder)
        if not any("SequenceClassification" in name for name in config.get("architectures") or ()):
            raise PolicyError(f"transformer.path: {path} is no sequence-classification checkpoint")
        # Hugging Face's configurations leave out the default, two.
        num_labels = len(config.get("id2label") or (0, 1))
        if num_labels not in (1, 2):
            raise PolicyError(
                f"transformer.path: {path} has {num_labels} classes; allowed are 1 (its logit's "
                "sigmoid) and 2 (wrong, right)"
            )
        if not list(folder.glob("*.safetensors")):
            raise PolicyError(f"transformer.path: {path} has no weights in safetensors")
        self.path = str(path)
        self.max_tokens = min(max_tokens, config.get("max_position_embeddings") or max_tokens)
        self._lock = threading.Lock()

    def score(self, attempt: Attempt) -> float:
        """Return P(correct | query, answer) of `attempt` in [0, 1]."""
        return self.score_batch([attempt])[0]

    def score_batch(self, attempts: Sequence[Attempt]) -> list[float]:
        """Return `score` of every attempt."""
        return [float(score) for score in expit(self.logits(attempts))]

    def logits(self, attempts: Sequence[Attempt]) -> list[float]:
        """Return the logit of every score, `BATCH_SIZE` at a time (one, where nothing can pad)."""
        logits: list[float] = []
        # The tokenizer keeps its truncation as state, so threads must take turns.
        with self._lock:
            tokenizer, model = self._model
            pads = tokenizer.pad_token is not None and model.config.pad_token_id is not None
            size = BATCH_SIZE if pads else 1
            for start in range(0, len(attempts), size):
                logits += self._logits(attempts[start : start + size])
        return logits

    @cached_property
    def _model(self) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
        from transformers import (  # noqa: PLC0415 - only where selected
            AutoModelForSequenceClassification,
            AutoTokenizer,
        )

        tokenizer = AutoTokenizer.from_pretrained(
            self.path, local_files_only=True, trust_remote_code=False
        )
        model = AutoModelForSequenceClassification.from_pretrained(
            self.path, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        return tokenizer, model.eval()

    def _logits(self, attempts: Sequence[Attempt]) -> list[float]:
        import torch  # noqa: PLC0415 - only where selected

        tokenizer, model = self._model
        batch = tokenizer(
            [_encodable(attempt.query) for attempt in attempts],
            [_encodable(attempt.answer) for attempt in attempts],
            padding=len(attempts) > 1,
            truncation="longest_first",
            max_length=min(self.max_tokens, tokenizer.model_max_length),
            return_tensors="pt",
        )
        with torch.inference_mode():
            logits_BC = model(**batch).logits.float()
        # A softmax over two is the sigmoid of their difference.
        one_label = logits_BC.shape[1] == 1
        logits_B = logits_BC[:, 0] if one_label else logits_BC[:, 1] - logits_BC[:, 0]
        logits: list[float] = logits_B.tolist()
        return logits


class TransformerSettings(Settings):
    """`path` is the checkpoint's folder; a pair longer than `max_tokens` is cut."""

    path: str
    max_tokens: int = Field(512, ge=8)


KIND = ScorerKind(
    settings=TransformerSettings,
    build=lambda settings, folder: Transformer(
        folder / settings.path, max_tokens=settings.max_tokens
    ),
)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        raise PolicyError(f"transformer.path: {folder} is not a Hugging Face model's folder")
    return config


def _encodable(text: str) -> str:
    """Return `text` without the lone surrogates that tokenizers refuse."""
    return text.encode("utf-8", "replace").decode()
