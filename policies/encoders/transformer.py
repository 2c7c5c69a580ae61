"""Transformer encoders by path, no download: what a sentence means, beside or instead of n-grams.

`SentenceVectors` reads a Hugging Face encoder's folder, also one that an installed distribution
ships, and the pooling of sentence-transformers folders (`1_Pooling/config.json`); others get the
mean over tokens. torch and transformers are imported when the first text is encoded, and only here.
Milliseconds per text; every process that encodes holds the weights.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import scipy.sparse as sp
from threadpoolctl import ThreadpoolController

from policies.encoders.base import Arrays, Encoded, Features, Floats, Reader, Reading
from policies.encoders.ngrams import NGrams
from policies.encoders.pooling import Pooling, pool, pooling_config, pooling_of
from policies.errors import PolicyError
from policies.files import PACKAGE, replacing_folder, shipped

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 32

LayerVectors = Callable[[Sequence[str], Sequence[int]], Floats]


class SentenceVectors:
    """Unit vectors [num_texts, num_dimensions] of texts, each cut to `max_tokens`.

    Code in the folder is never run. Thread-safe: one call computes at a time, a single text on one
    core (a request's few tokens gain nothing from more, and beside other work they wait for each
    other: 13 times as long on two busy cores). `path` is a model's folder, or names one that an
    installed distribution ships (package:DISTRIBUTION/FOLDER); raises `PolicyError` where it is
    neither.
    """

    def __init__(self, path: Path | str, *, max_tokens: int) -> None:
        self.path = str(path)
        self.folder = shipped(self.path) if self.path.startswith(PACKAGE) else Path(path)
        config = self.folder / "config.json"
        if not config.is_file():
            raise PolicyError(
                f"{path} is not a Hugging Face model's folder (package:DISTRIBUTION/FOLDER names "
                "one that an installed distribution ships)"
            )
        if max_tokens < 4:
            raise PolicyError(f"max_tokens: {max_tokens} is not at least 4")
        self.max_tokens = max_tokens
        shape = json.loads(config.read_text())
        self.num_dimensions = _number(shape, ("hidden_size", "dim", "d_model"), config)
        self.num_layers = _number(shape, ("num_hidden_layers", "n_layers", "num_layers"), config)
        self._lock = threading.Lock()

    def __call__(self, texts: Sequence[str]) -> Floats:
        """Encode `texts`."""
        return self._encode(texts, self.pooled, (self.num_dimensions,))

    def of_layers(self, texts: Sequence[str], layers: Sequence[int]) -> Floats:
        """Return unit vectors [num_texts, len(layers), num_dimensions], pooled after each layer.

        Layers count from 1; the last is what calling returns.
        """

        def pooled(batch: Sequence[str]) -> Tensor:
            return self._pooled(batch, layers)

        return self._encode(texts, pooled, (len(layers), self.num_dimensions))

    def _encode(
        self,
        texts: Sequence[str],
        pooled: Callable[[Sequence[str]], Tensor],
        shape: tuple[int, ...],
    ) -> Floats:
        """Encode `BATCH_SIZE` texts at a time, in order of length."""
        import torch  # noqa: PLC0415 - only where selected

        vectors = np.empty((len(texts), *shape), np.float32)
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        # The tokenizer keeps its truncation as state, so threads must take turns. (Not in inference
        # mode: weights loaded there could not be fine-tuned afterwards.)
        with self._lock, torch.no_grad(), self._threads(len(texts)):
            for start in range(0, len(order), BATCH_SIZE):
                rows = order[start : start + BATCH_SIZE]
                vectors[rows] = pooled([texts[row] for row in rows]).float().cpu().numpy()
        return vectors

    def pooled(self, texts: Sequence[str]) -> Tensor:
        """Return the unit vectors of one batch as a tensor that gradients can flow through."""
        return self._pooled(texts, [self.num_layers])[:, 0]

    def _pooled(self, texts: Sequence[str], layers: Sequence[int]) -> Tensor:
        import torch  # noqa: PLC0415 - only where selected

        batch = self.tokenizer(
            [text.encode("utf-8", "replace").decode() for text in texts],
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        ).to(self.model.device)
        output = self.model(**batch, output_hidden_states=True)
        pooled = []
        for layer in layers:
            # Some architectures normalise once more after the last layer.
            hidden_BTD = (
                output.last_hidden_state
                if layer == self.num_layers
                else output.hidden_states[layer]
            )
            pooled.append(pool(hidden_BTD, batch["attention_mask"], self._pooling))
        return torch.nn.functional.normalize(torch.stack(pooled, 1), dim=-1)

    def save(self, folder: Path) -> None:
        """Write weights (safetensors), configuration, tokenizer and pooling to `folder`."""
        with replacing_folder(folder) as new:
            self.model.save_pretrained(new)
            self.tokenizer.save_pretrained(new)
            (new / "1_Pooling").mkdir()
            told = json.dumps(pooling_config(self._pooling))
            (new / "1_Pooling" / "config.json").write_text(told)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer."""
        from transformers import AutoTokenizer  # noqa: PLC0415 - only where selected

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            self.folder, local_files_only=True, trust_remote_code=False
        )
        return tokenizer

    @cached_property
    def model(self) -> PreTrainedModel:
        """The folder's encoder."""
        from transformers import AutoModel  # noqa: PLC0415 - only where selected

        model: PreTrainedModel = AutoModel.from_pretrained(
            self.folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        model.eval()  # type: ignore[no-untyped-call]
        return model

    def _threads(self, num_texts: int) -> AbstractContextManager[object]:
        """Return what holds this thread's computing to one core for a single text."""
        if num_texts > 1:
            return nullcontext()
        limited: AbstractContextManager[object] = self._controller.limit(
            limits=1, user_api="openmp"
        )
        return limited

    @cached_property
    def _controller(self) -> ThreadpoolController:
        """The libraries that compute, those of torch among them: found once."""
        return ThreadpoolController()

    @cached_property
    def _pooling(self) -> Pooling:
        file = self.folder / "1_Pooling" / "config.json"
        return pooling_of(json.loads(file.read_text()), file) if file.is_file() else "mean"


class Neural:
    """A frozen encoder: hashed n-grams as features; its pooled vectors, side by side, as the point.

    The vectors are those after `num_layers` of its layers, evenly spaced with the last among them,
    each less its mean: routing lives off what the lower layers still know and the last, trained to
    tell meanings apart, has given up. `path` is the encoder's folder (see `SentenceVectors`), which
    must still be there when the router is loaded; `max_tokens` cuts long queries. `vectors` encodes
    in the folder's stead (where the vectors of known queries are kept).
    """

    kind = "neural"

    def __init__(
        self,
        *,
        path: str,
        max_tokens: int = 256,
        num_layers: int = 6,
        bits: int = 16,
        vectors: LayerVectors | None = None,
    ) -> None:
        own = SentenceVectors(path, max_tokens=max_tokens)
        if num_layers < 1:
            raise PolicyError(f"neural.num_layers: {num_layers} is not at least 1")
        num_taken = min(num_layers, own.num_layers)
        self.path = path
        self.max_tokens = max_tokens
        self.num_layers = num_layers
        self.layers = [own.num_layers * (i + 1) // num_taken for i in range(num_taken)]
        self.num_dimensions = num_taken * own.num_dimensions
        self._vectors = vectors or own.of_layers
        self._ngrams = NGrams(bits=bits, num_dimensions=1)
        self.mean_: Floats = np.zeros((num_taken, own.num_dimensions), np.float32)

    @property
    def num_features(self) -> int:
        """The n-grams."""
        return self._ngrams.num_features

    def fit_encode(self, texts: Sequence[str]) -> Encoded:
        """Learn the n-grams' weights and the vectors' means, which say nothing of a query.

        Returns n-grams and vectors of the same queries.
        """
        matrix = self._ngrams.fit_encode(texts).matrix_QF
        vectors = self._vectors(texts, self.layers)
        self.mean_ = vectors.mean(0)
        return Encoded(matrix, self._points(vectors, self.mean_))

    def features(self, text: str) -> Features:
        """Return the n-grams of one query."""
        return self._ngrams.features(text)

    def reader(self, weights_FC: Floats) -> Reader:
        """Return what hashes and encodes one query at a time."""
        read_ngrams = self._ngrams.reader(weights_FC)
        mean = self.mean_

        def read(text: str) -> Reading:
            vectors = self._vectors([text], self.layers)
            return read_ngrams(text)._replace(point_D=self._points(vectors, mean)[0])

        return read

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return the n-grams and the vectors of many queries."""
        vectors = self._vectors(texts, self.layers)
        return Encoded(self._ngrams.matrix(texts), self._points(vectors, self.mean_))

    def names(self, text: str) -> dict[int, str]:
        """Return the n-grams."""
        return self._ngrams.names(text)

    def settings(self) -> dict[str, Any]:
        """Return the hyperparameters."""
        return {
            "path": self.path,
            "max_tokens": self.max_tokens,
            "num_layers": self.num_layers,
            "bits": self._ngrams.bits,
        }

    def arrays(self) -> Arrays:
        """Return the n-grams' arrays and the means."""
        return {**self._ngrams.arrays(), "mean": self.mean_}

    def restore(self, arrays: Arrays) -> Self:
        """Take back what `arrays` returned."""
        if arrays["mean"].shape != self.mean_.shape:
            raise PolicyError(
                f"neural: the mean has shape {arrays['mean'].shape}, but {len(self.layers)} layers "
                f"of the encoder at {self.path} have {self.mean_.shape}"
            )
        self._ngrams.restore(arrays)
        self.mean_ = arrays["mean"]
        return self

    def _points(self, vectors: Floats, mean: Floats) -> Floats:
        """Return the centred vectors, scaled alike, side by side: a point has norm 1."""
        centred = vectors - mean
        norms = np.linalg.norm(centred, axis=-1, keepdims=True)
        centred /= np.maximum(norms * np.sqrt(len(self.layers)), 1e-6)
        return np.asarray(centred.reshape(len(vectors), -1), np.float32)


class FineTuned:
    """A transformer trained end to end as a router: its pooled unit vector is all that heads see.

    Its point is that less the mean. `policies.routing.finetune` trains such an encoder;
    `fit_encode` only learns the mean.
    """

    kind = "finetuned"

    def __init__(self, *, path: str, max_tokens: int = 256) -> None:
        self.vectors = SentenceVectors(path, max_tokens=max_tokens)
        self.num_dimensions = self.vectors.num_dimensions
        self.num_features = self.num_dimensions
        self.mean_: Floats = np.zeros(self.num_dimensions, np.float32)

    def fit_encode(self, texts: Sequence[str]) -> Encoded:
        """Learn the mean vector, and return the vectors of the same queries."""
        vectors = self.vectors(texts)
        self.mean_ = vectors.mean(0)
        return self._encoded(vectors)

    def features(self, text: str) -> Features:
        """Return the vector of one query."""
        return Features(np.arange(self.num_features, dtype=np.int32), self.vectors([text])[0])

    def reader(self, weights_FC: Floats) -> Reader:
        """Return what encodes one query at a time."""
        mean = self.mean_

        def read(text: str) -> Reading:
            features = self.features(text)
            point_D = (features.values - mean) / np.float32(2)
            return Reading(features, features.weighed(weights_FC), point_D)

        return read

    def encode(self, texts: Sequence[str]) -> Encoded:
        """Return the vectors of many queries."""
        return self._encoded(self.vectors(texts))

    def _encoded(self, vectors: Floats) -> Encoded:
        return Encoded(sp.csr_matrix(vectors), (vectors - self.mean_) / np.float32(2))

    def names(self, text: str) -> dict[int, str]:  # noqa: ARG002
        """Return nothing: dimensions of a vector have no name."""
        return {}

    def settings(self) -> dict[str, Any]:
        """Return the hyperparameters."""
        return {"path": self.vectors.path, "max_tokens": self.vectors.max_tokens}

    def arrays(self) -> Arrays:
        """Return the mean."""
        return {"mean": self.mean_}

    def restore(self, arrays: Arrays) -> Self:
        """Take back what `arrays` returned."""
        if arrays["mean"].shape != (self.num_dimensions,):
            raise PolicyError(
                f"finetuned: the mean has shape {arrays['mean'].shape}, but the encoder at "
                f"{self.vectors.path} has {self.num_dimensions} dimensions"
            )
        self.mean_ = arrays["mean"]
        return self


def _number(config: Mapping[str, Any], names: Sequence[str], file: Path) -> int:
    """Return the first of `names` in a model's configuration; architectures differ in theirs."""
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise PolicyError(f"{file} names none of {', '.join(names)}")
