"""An encoder in transformers: a thread that encodes batches, one after another, of whoever waits.

Shapes: B texts of a batch, T tokens, D dimensions.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from models.engines.encoder import Folder
from models.errors import EngineFailed, PoolError
from models.fair import FairThreads
from models.sources.safetensors import read_json
from models.spec import EngineSpec
from policies.encoders.pooling import pool

_ACTIVATIONS = {"Tanh": torch.tanh, "Identity": lambda x: x, "ReLU": torch.relu}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
P = ParamSpec("P")
R = TypeVar("R")


class TransformerEncoder:
    """One loaded model; see `models.engines.encoder.engine.Encoder`."""

    def __init__(self, spec: EngineSpec, folder: Folder, *, batch_size: int) -> None:
        """Load `folder`, which blocks; raises `PoolError`."""
        from transformers import AutoModel, AutoModelForSequenceClassification  # noqa: PLC0415

        device = spec.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        kind: Any = AutoModelForSequenceClassification if folder.cross else AutoModel
        try:
            model = kind.from_pretrained(
                folder.weights,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=_DTYPES.get(spec.dtype, torch.float32),
            )
        except (OSError, ValueError) as error:
            raise PoolError(f"{folder.weights}: transformers cannot load it: {error}") from None
        self.reader = folder.reader()
        self._name = spec.name
        self._pooling = folder.pooling
        self._batch_size = batch_size
        self._model = model.to(device).eval()
        self._device = device
        self._takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
        self._dense = [_dense(path, device) for path in folder.dense]
        self._thread = FairThreads(1, "encoder")

    async def vectors(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the vectors of all `rows`; those of like lengths are encoded together."""
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        found: dict[int, NDArray[np.float32]] = {}
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            vectors_BD = await self._run(self._vectors, [rows[index] for index in batch])
            found.update(zip(batch, vectors_BD, strict=True))
        return np.stack([found[index] for index in range(len(rows))])

    async def scores(self, query: str, texts: Sequence[str]) -> tuple[NDArray[np.float32], int]:
        """Return the scores of `texts`, a batch after another."""
        scores, num_tokens = [], 0
        for start in range(0, len(texts), self._batch_size):
            batch = texts[start : start + self._batch_size]
            scores_B, num_read = await self._run(self._scores, query, batch)
            scores.append(scores_B)
            num_tokens += num_read
        return np.concatenate(scores), num_tokens

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    @torch.inference_mode()
    def _vectors(self, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        ids_BT, mask_BT = self._padded(batch)
        hidden_BTD = self._model(**self._inputs(ids_BT, mask_BT)).last_hidden_state
        pooled_BD = pool(hidden_BTD, mask_BT, self._pooling)
        for weight, bias, activation in self._dense:
            pooled_BD = activation(functional.linear(pooled_BD, weight, bias))
        found: NDArray[np.float32] = pooled_BD.float().cpu().numpy()
        return found

    @torch.inference_mode()
    def _scores(self, query: str, texts: Sequence[str]) -> tuple[NDArray[np.float32], int]:
        encoded = self.reader.pairs(query, texts)
        ids_BT, mask_BT = self._padded([one.ids for one in encoded])
        types_BT, _ = self._padded([one.type_ids for one in encoded])
        logits_B1 = self._model(**self._inputs(ids_BT, mask_BT, types_BT)).logits
        scores_B: NDArray[np.float32] = logits_B1[:, 0].float().sigmoid().cpu().numpy()
        return scores_B, sum(len(one.ids) for one in encoded)

    def _inputs(
        self, ids_BT: Tensor, mask_BT: Tensor, types_BT: Tensor | None = None
    ) -> dict[str, Tensor]:
        inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
        if types_BT is not None and self._takes_types:
            inputs["token_type_ids"] = types_BT
        return inputs

    def _padded(self, batch: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return ids and mask, [B, T], short rows filled up at their ends."""
        longest = max(map(len, batch))
        padding = self._model.config.pad_token_id or 0
        ids = [[*row, *[padding] * (longest - len(row))] for row in batch]
        mask = [[1] * len(row) + [0] * (longest - len(row)) for row in batch]
        return (
            torch.tensor(ids, device=self._device),
            torch.tensor(mask, device=self._device),
        )

    async def _run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Return what `function` returns on the encoder's thread; failures are the engine's."""
        work = partial(function, *args, **kwargs)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except RuntimeError as error:
            raise EngineFailed(f"the engine {self._name} failed: {error}") from error


def _dense(path: Path, device: str) -> tuple[Tensor, Tensor | None, Any]:
    """Load a layer after the pooling: weight, bias, activation; raises `PoolError`."""
    config = read_json(path / "config.json")
    name = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    if name not in _ACTIVATIONS:
        raise PoolError(
            f"{path / 'config.json'}: activation_function {name!r} is not supported; allowed are "
            f"{', '.join(_ACTIVATIONS)}"
        )
    file = path / "model.safetensors"
    if not file.is_file():
        raise PoolError(f"there is no {file}")
    tensors = load_file(file, device=device)
    return tensors["linear.weight"], tensors.get("linear.bias"), _ACTIVATIONS[name]
