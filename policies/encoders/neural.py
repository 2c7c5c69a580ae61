"""Transformer sentence encoders by path: any Hugging Face encoder folder, no download.

Reads the pooling of sentence-transformers folders (`1_Pooling/config.json`); others get the mean
over tokens. torch and transformers are imported when a query is first encoded, and only here.
Milliseconds per query instead of microseconds; every process that decides holds the weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from policies.encoders.base import Arrays, Features, Floats
from policies.encoders.ngrams import NGrams
from policies.errors import PolicyError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 32


class Neural:
    """A transformer's pooled vector beside hashed n-grams, each block of norm about 1.

    `path` is the encoder's folder; it is kept in the router file and must still be there when the
    router is loaded. `max_tokens` cuts long queries. `weight` scales the transformer's block: the
    larger, the less its weights are regularised.
    """

    kind = "neural"

    def __init__(
        self, *, path: str, max_tokens: int = 256, weight: float = 2.0, bits: int = 16
    ) -> None:
        folder = Path(path)
        if not (folder / "config.json").is_file():
            raise PolicyError(f"neural.path: {path} is not a Hugging Face model's folder")
        self.path = path
        self.max_tokens = max_tokens
        self.weight = weight
        self.num_dimensions = int(json.loads((folder / "config.json").read_text())["hidden_size"])
        self._ngrams = NGrams(bits=bits, num_dimensions=1)
        self.mean_: Floats = np.zeros(self.num_dimensions, np.float32)

    @property
    def num_features(self) -> int:
        """The n-grams, then the vector."""
        return self._ngrams.num_features + self.num_dimensions

    def fit(self, texts: Sequence[str]) -> Self:
        """Learn the n-grams' weights and the vectors' mean, which says nothing of a query."""
        self._ngrams.fit(texts)
        self.mean_ = self._vectors(texts).mean(0)
        return self

    def features(self, text: str) -> Features:
        """Return the features of one query."""
        grams = self._ngrams.features(text)
        vector = self._centred([text])[0] * np.float32(self.weight)
        own = np.arange(self._ngrams.num_features, self.num_features)
        return Features(np.concatenate((grams.ids, own)), np.concatenate((grams.values, vector)))

    def matrix(self, texts: Sequence[str]) -> sp.csr_matrix:
        """Return `features` of many queries."""
        dense = sp.csr_matrix(self._centred(texts) * np.float32(self.weight))
        return sp.csr_matrix(sp.hstack([self._ngrams.matrix(texts), dense], dtype=np.float32))

    def embeddings(self, matrix: sp.csr_matrix) -> Floats:
        """Return the centred vectors."""
        dense = matrix[:, self._ngrams.num_features :].toarray()
        return np.asarray(dense / self.weight, np.float32)

    def names(self, text: str) -> dict[int, str]:
        """Return the n-grams; dimensions of a vector have no name."""
        return self._ngrams.names(text)

    def settings(self) -> dict[str, Any]:
        """Return the hyperparameters."""
        return {
            "path": self.path,
            "max_tokens": self.max_tokens,
            "weight": self.weight,
            "bits": self._ngrams.bits,
        }

    def arrays(self) -> Arrays:
        """Return the n-grams' arrays and the mean."""
        return {**self._ngrams.arrays(), "mean": self.mean_}

    def restore(self, arrays: Arrays) -> Self:
        """Take back what `arrays` returned."""
        if arrays["mean"].shape != (self.num_dimensions,):
            raise PolicyError(
                f"neural: the mean has shape {arrays['mean'].shape}, but the encoder at "
                f"{self.path} has {self.num_dimensions} dimensions"
            )
        self._ngrams.restore(arrays)
        self.mean_ = arrays["mean"]
        return self

    def _centred(self, texts: Sequence[str]) -> Floats:
        vectors = self._vectors(texts) - self.mean_
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        centred: Floats = vectors / np.maximum(norms, 1e-6)
        return centred

    @cached_property
    def _model(self) -> tuple[PreTrainedTokenizerBase, nn.Module, bool]:
        from transformers import AutoModel, AutoTokenizer  # noqa: PLC0415 - only where selected

        pooling = Path(self.path) / "1_Pooling" / "config.json"
        first_token = pooling.is_file() and bool(
            json.loads(pooling.read_text()).get("pooling_mode_cls_token")
        )
        tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        model = AutoModel.from_pretrained(self.path, local_files_only=True).eval()
        return tokenizer, model, first_token

    def _vectors(self, texts: Sequence[str]) -> Floats:
        """Return unit vectors [num_texts, num_dimensions], encoded in order of length."""
        import torch  # noqa: PLC0415 - only where selected

        tokenizer, model, first_token = self._model
        vectors: NDArray[np.float32] = np.empty((len(texts), self.num_dimensions), np.float32)
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        with torch.inference_mode():
            for start in range(0, len(order), BATCH_SIZE):
                rows = order[start : start + BATCH_SIZE]
                batch = tokenizer(
                    [texts[row].encode("utf-8", "replace").decode() for row in rows],
                    padding=True,
                    truncation=True,
                    max_length=self.max_tokens,
                    return_tensors="pt",
                )
                hidden_BTD = model(**batch).last_hidden_state
                mask_BT1 = batch["attention_mask"][..., None]
                pooled_BD = (
                    hidden_BTD[:, 0]
                    if first_token
                    else (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
                )
                vectors[rows] = torch.nn.functional.normalize(pooled_BD, dim=-1).float().numpy()
        return vectors
