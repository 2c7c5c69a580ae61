"""The encoder engine: a thread that encodes batches, one after another, of whoever waits.

Shapes: B texts of a batch, T tokens, D dimensions.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from models.engines.base import Chunk, EngineStats, GenerationRequest
from models.engines.encoder import EncoderOptions, Folder, Pooling
from models.errors import ContextOverflow, EngineFailed, EngineOverloaded, PoolError, RequestError
from models.sources.safetensors import read_json
from models.spec import EngineSpec
from models.tokenizer import read_tokenizer

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import Encoding

_ACTIVATIONS = {"Tanh": torch.tanh, "Identity": lambda x: x, "ReLU": torch.relu}


class Encoder:
    """One loaded model. Its methods block, and are called on one thread."""

    def __init__(self, folder: Folder, device: str, dtype: torch.dtype | None) -> None:
        """Load `folder`; raises `PoolError`."""
        from transformers import AutoModel, AutoModelForSequenceClassification  # noqa: PLC0415

        kind: Any = AutoModelForSequenceClassification if folder.cross else AutoModel
        try:
            model = kind.from_pretrained(
                folder.weights,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=dtype or torch.float32,
            )
        except (OSError, ValueError) as error:
            raise PoolError(f"{folder.weights}: transformers cannot load it: {error}") from None
        self.folder = folder
        self._model = model.to(device).eval()
        self._device = device
        self._tokenizer: tokenizers.Tokenizer = read_tokenizer(folder.weights)
        self._takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
        self._dense = [_dense(path, device) for path in folder.dense]

    def read(self, texts: Sequence[str | tuple[int, ...]], *, cut: bool) -> list[list[int]]:
        """Return the ids of `texts`; with `cut`, of as many tokens as the model holds.

        Raises `ContextOverflow` for one that is too long, `RequestError` for ids it does not know.
        """
        most, vocab_size = self.folder.max_tokens, self._tokenizer.get_vocab_size()
        prompts = [self.folder.prompt + text for text in texts if isinstance(text, str)]
        encoded = iter(self._tokenized(prompts, cut=cut))
        found = [next(encoded).ids if isinstance(text, str) else [*text] for text in texts]
        for index, ids in enumerate(found):
            if not ids or not 0 <= min(ids) <= max(ids) < vocab_size:
                raise RequestError(
                    f"input[{index}]: it is empty, or an id is outside of the vocabulary of "
                    f"{vocab_size}",
                    "input",
                )
            if len(ids) > most and not cut:
                raise ContextOverflow(
                    f"This model's maximum context length is {most} tokens, but input[{index}] "
                    f"has {len(ids)}.",
                    "input",
                )
        return [ids[:most] for ids in found]

    def _tokenized(self, prompts: Sequence[Any], *, cut: bool) -> list[Encoding]:
        """Tokenize texts or pairs; what is cut keeps its special tokens, and of pairs the query."""
        pairs = bool(prompts) and isinstance(prompts[0], tuple)
        if not cut:
            self._tokenizer.no_truncation()
            return self._tokenizer.encode_batch(prompts)
        strategy = "only_second" if pairs else "longest_first"
        self._tokenizer.enable_truncation(self.folder.max_tokens, strategy=strategy)
        try:
            return self._tokenizer.encode_batch(prompts)
        except Exception as error:  # the library raises bare exceptions
            raise RequestError(f"query: it leaves no room for a text: {error}", "query") from None

    @torch.inference_mode()
    def vectors(self, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return a vector of length one for each row of ids, [B, D]."""
        ids_BT, mask_BT = self._padded(batch)
        hidden_BTD = self._model(**self._inputs(ids_BT, mask_BT)).last_hidden_state
        pooled_BD = pool(hidden_BTD, mask_BT, self.folder.pooling)
        for weight, bias, activation in self._dense:
            pooled_BD = activation(functional.linear(pooled_BD, weight, bias))
        found: NDArray[np.float32] = functional.normalize(pooled_BD.float(), dim=-1).cpu().numpy()
        return found

    @torch.inference_mode()
    def pair_scores(self, query: str, texts: Sequence[str]) -> tuple[NDArray[np.float32], int]:
        """Return how well each of `texts` answers `query`, [B] in (0, 1), and the tokens read."""
        encoded = self._tokenized([(query, text) for text in texts], cut=True)
        ids_BT, mask_BT = self._padded([one.ids for one in encoded])
        types_BT, _ = self._padded([one.type_ids for one in encoded])
        logits_B1 = self._model(**self._inputs(ids_BT, mask_BT, types_BT)).logits
        scores: NDArray[np.float32] = logits_B1[:, 0].float().sigmoid().cpu().numpy()
        return scores, sum(len(one.ids) for one in encoded)

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


def pool(hidden_BTD: Tensor, mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """Return one vector per text, [B, D], as sentence-transformers' module `Pooling` does."""
    mask_BT1 = mask_BT[..., None].to(hidden_BTD.dtype)
    if pooling == "cls":
        return hidden_BTD[:, 0]
    if pooling == "max":
        return hidden_BTD.masked_fill(mask_BT1 == 0, -torch.inf).amax(1)
    if pooling == "lasttoken":
        last_B = mask_BT.sum(1) - 1
        return hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]
    if pooling == "weightedmean":
        places_T1 = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)[:, None]
        mask_BT1 = mask_BT1 * places_T1.to(hidden_BTD.dtype)
    return (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1e-9)


def _dense(path: Any, device: str) -> tuple[Tensor, Tensor | None, Any]:  # noqa: ANN401
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


class EncoderEngine:
    """One encoder; see `models.engines.base.Engine`. Requests take turns, a batch each."""

    def __init__(
        self, spec: EngineSpec, options: EncoderOptions, name: str, folder: Folder
    ) -> None:
        """Only remember; `start` loads the model `name`."""
        self._spec = spec
        self._options = options
        self._name = name
        self._folder = folder
        self._encoder: Encoder | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._num_running = 0
        self._busy_s = 0.0

    @property
    def members(self) -> tuple[str, ...]:
        """The one model."""
        return (self._name,)

    async def start(self) -> None:
        """Load the model. Raises `PoolError`."""
        device = self._spec.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        self._encoder = await self._run(Encoder, self._folder, device, named.get(self._spec.dtype))

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk]:
        """Yield one chunk with a row per input; see the contract."""
        self.check_health()
        encoder, asked = self._encoder, request.encoding
        assert encoder is not None, "check_health raises before start"
        if asked is None or asked.kind not in self._folder.encodes:
            told = "a text" if asked is None else f"a {asked.kind}"
            raise RequestError(
                f"{self._name} is an encoder that cannot answer with {told}", "model"
            )
        if self._num_running > self._spec.max_queued_requests:
            raise EngineOverloaded(f"{self._num_running} requests wait already", 1.0)
        self._num_running += 1
        try:
            if self._folder.cross:
                rows, num_tokens = await self._scored(encoder, asked.query or "", asked.inputs)
            else:
                queries = () if asked.query is None else (asked.query,)
                texts = (*queries, *asked.inputs)
                ids = await self._run(encoder.read, texts, cut=asked.cut)
                rows, num_tokens = await self._encoded(encoder, ids), sum(map(len, ids))
                if asked.query is not None:
                    rows = rows[1:] @ rows[:1].T
        finally:
            self._num_running -= 1
        yield Chunk(text="", tokens=(), finish_reason="stop", rows=rows, prompt_tokens=num_tokens)

    def stats(self) -> EngineStats:
        """Return a snapshot; cheap."""
        running = min(self._num_running, 1)
        return EngineStats(
            running_requests=running,
            queued_requests=self._num_running - running,
            active_lanes=running,
            busy_seconds_total=self._busy_s,
        )

    def check_health(self) -> None:
        """Raise `EngineFailed` if the engine cannot serve (any more)."""
        if self._encoder is None:
            raise EngineFailed(f"the engine {self._spec.name} is not running")

    async def stop(self) -> None:
        """Free everything; idempotent."""
        self._encoder = None
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _encoded(self, encoder: Encoder, ids: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the vectors of all `ids`; those of like lengths are encoded together."""
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        found: dict[int, NDArray[np.float32]] = {}
        for start in range(0, len(order), self._options.batch_size):
            rows = order[start : start + self._options.batch_size]
            vectors = await self._run(encoder.vectors, [ids[row] for row in rows])
            found.update(zip(rows, vectors, strict=True))
        return np.stack([found[row] for row in range(len(ids))])

    async def _scored(
        self, encoder: Encoder, query: str, texts: Sequence[Any]
    ) -> tuple[NDArray[np.float32], int]:
        scores, num_tokens = [], 0
        for start in range(0, len(texts), self._options.batch_size):
            batch = texts[start : start + self._options.batch_size]
            found, read = await self._run(encoder.pair_scores, query, batch)
            scores.append(found)
            num_tokens += read
        return np.concatenate(scores)[:, None], num_tokens

    async def _run(self, function: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Return what `function` returns on the engine's thread; failures are the engine's."""

        def timed() -> Any:  # noqa: ANN401
            started_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            except RuntimeError as error:
                raise EngineFailed(f"the encoder {self._name} failed: {error}") from error
            finally:
                self._busy_s += time.perf_counter() - started_s

        return await asyncio.get_running_loop().run_in_executor(self._thread, timed)
