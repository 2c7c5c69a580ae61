"""Vectors of texts from a Hugging Face encoder's folder; no download.

Reads the pooling of sentence-transformers folders (`1_Pooling/config.json`); others get the mean
over tokens. torch and transformers are imported when the first text is encoded, and only here.
Milliseconds per text; every process that encodes holds the weights.
"""

from __future__ import annotations

import json
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from policies.encoders.base import Floats
from policies.errors import PolicyError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_SIZE = 32


class SentenceVectors:
    """Unit vectors [num_texts, num_dimensions] of texts, each cut to `max_tokens`.

    Code in the folder is never run. Thread-safe: one call computes at a time. Raises `PolicyError`
    where `path` is not a model's folder.
    """

    def __init__(self, path: Path | str, *, max_tokens: int) -> None:
        config = Path(path) / "config.json"
        if not config.is_file():
            raise PolicyError(f"{path} is not a Hugging Face model's folder")
        if max_tokens < 4:
            raise PolicyError(f"max_tokens: {max_tokens} is not at least 4")
        self.path = str(path)
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
        with self._lock, torch.no_grad():
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
        mask_BT1 = batch["attention_mask"][..., None]
        pooled = []
        for layer in layers:
            # Some architectures normalise once more after the last layer.
            hidden_BTD = (
                output.last_hidden_state
                if layer == self.num_layers
                else output.hidden_states[layer]
            )
            pooled.append(
                hidden_BTD[:, 0]
                if self._first_token
                else (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
            )
        return torch.nn.functional.normalize(torch.stack(pooled, 1), dim=-1)

    def save(self, folder: Path) -> None:
        """Write weights (safetensors), configuration, tokenizer and pooling to `folder`."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            new, old = Path(temporary) / "new", Path(temporary) / "old"
            self.model.save_pretrained(new)
            self.tokenizer.save_pretrained(new)
            (new / "1_Pooling").mkdir()
            pooling = {"pooling_mode_cls_token": self._first_token}
            (new / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
            if folder.exists():
                folder.rename(old)
            new.rename(folder)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer."""
        from transformers import AutoTokenizer  # noqa: PLC0415 - only where selected

        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            self.path, local_files_only=True, trust_remote_code=False
        )
        return tokenizer

    @cached_property
    def model(self) -> PreTrainedModel:
        """The folder's encoder."""
        from transformers import AutoModel  # noqa: PLC0415 - only where selected

        model: PreTrainedModel = AutoModel.from_pretrained(
            self.path, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
        model.eval()  # type: ignore[no-untyped-call]
        return model

    @cached_property
    def _first_token(self) -> bool:
        pooling = Path(self.path) / "1_Pooling" / "config.json"
        return pooling.is_file() and bool(
            json.loads(pooling.read_text()).get("pooling_mode_cls_token")
        )


def _number(config: Mapping[str, Any], names: Sequence[str], file: Path) -> int:
    """Return the first of `names` in a model's configuration; architectures differ in theirs."""
    for name in names:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise PolicyError(f"{file} names none of {', '.join(names)}")
