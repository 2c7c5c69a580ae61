"""An encoder inside vLLM, which batches the texts of all requests."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from models.engines.encoder import Folder, has_modules, writes_texts
from models.engines.encoder.engine import Encoder, EncoderEngine
from models.engines.vllm import VllmOptions
from models.engines.vllm.engine import configure
from models.errors import EngineFailed
from models.spec import EngineSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.engine.async_llm import AsyncLLM

_AT_ONCE = 256  # requests; vLLM queues their texts itself


class VllmEncoder:
    """One checkpoint that pools; see `models.engines.encoder.engine.Encoder`."""

    def __init__(self, llm: AsyncLLM, folder: Folder, *, takes_types: bool) -> None:
        """`takes_types`: the model distinguishes a query's tokens from a text's."""
        self.reader = folder.reader()
        self._llm = llm
        self._takes_types = takes_types

    async def vectors(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the vectors of all `rows`."""
        return np.stack(await asyncio.gather(*(self._pooled(row, "embed") for row in rows)))

    async def scores(self, query: str, texts: Sequence[str]) -> tuple[NDArray[np.float32], int]:
        """Return the scores of `texts`."""
        pairs = await asyncio.to_thread(self.reader.pairs, query, texts)
        waiting = []
        for pair in pairs:
            # vLLM wants to know where the text begins.
            start = pair.type_ids.index(1) if 1 in pair.type_ids else len(pair.ids)
            text_from = start if self._takes_types else None
            waiting.append(self._pooled(pair.ids, "classify", text_from=text_from))
        scores = np.concatenate(await asyncio.gather(*waiting))
        return scores, sum(len(pair.ids) for pair in pairs)

    def close(self) -> None:
        """End vLLM's processes."""
        self._llm.shutdown()

    async def _pooled(
        self, ids: Sequence[int], task: Literal["embed", "classify"], text_from: int | None = None
    ) -> NDArray[np.float32]:
        from vllm import PoolingParams  # noqa: PLC0415 - takes seconds to import
        from vllm.inputs.engine import tokens_input  # noqa: PLC0415
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError  # noqa: PLC0415

        asked = PoolingParams(task=task)
        if text_from is not None:
            asked.extra_kwargs = {"compressed_token_type_ids": text_from}
        outputs = self._llm.encode(tokens_input(list(ids)), asked, uuid4().hex)
        try:
            [output] = [output async for output in outputs]
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineFailed(f"vLLM failed: {error}") from error
        found: NDArray[np.float32] = output.outputs.data.float().cpu().numpy()
        return found


def encoder_engine(
    spec: EngineSpec, options: VllmOptions, name: str, folder: Folder
) -> EncoderEngine:
    """Return the engine of an encoder's checkpoint."""

    async def load() -> Encoder:
        config = await asyncio.to_thread(_configured, spec, options, folder)
        from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415 - takes seconds to import

        try:
            llm = AsyncLLM.from_vllm_config(config)
        except Exception as error:  # whatever its subprocess died of
            raise EngineFailed(f"engines.{spec.name}: vLLM did not start: {error}") from error
        types = getattr(config.model_config.hf_config, "type_vocab_size", 0)
        return await asyncio.to_thread(VllmEncoder, llm, folder, takes_types=types > 1)

    return EncoderEngine(spec, name, folder.encodes, load, num_at_once=_AT_ONCE)


def _configured(spec: EngineSpec, options: VllmOptions, folder: Folder) -> VllmConfig:
    """Return vLLM's configuration: plain encoders are pooled here as they are everywhere."""
    from vllm.config import PoolerConfig  # noqa: PLC0415 - takes seconds to import

    args: dict[str, Any] = {"runner": "pooling", "max_model_len": folder.max_tokens}
    says_how = folder.cross or writes_texts(folder.weights) or has_modules(folder.weights)
    if not says_how:
        args["pooler_config"] = PoolerConfig(seq_pooling_type="MEAN")
    return configure(spec, folder.weights, {**args, **options.engine_args}, options.num_threads)
