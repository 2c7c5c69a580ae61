"""The vLLM engine as the rest of Shoal sees it: vLLM's `AsyncLLM` behind our contract."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from models.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterSource, factor_names
from models.card import ModelCard
from models.engines.answer_grammar import answer_grammar, compiled
from models.engines.answer_reader import AnswerReader
from models.engines.base import Chunk, EngineStats, GenerationRequest, SamplingOptions
from models.engines.kind import EngineTraits
from models.engines.requests import adapters_of, check_request, relative_weights
from models.engines.text import Vocabulary
from models.errors import EngineFailed, EngineOverloaded, PoolError, RequestError
from models.sources.locate import locate
from models.sources.safetensors import read_tensors
from models.spec import EngineSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

    from models.engines.vllm.translate import LoadLogger

_FUSED_FOLDER = "fused"
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM takes


@dataclass(frozen=True, kw_only=True)
class _Running:
    """What exists between start and stop."""

    llm: AsyncLLM
    load: LoadLogger
    vocabulary: Vocabulary
    context_tokens: int
    max_running: int
    kv_bytes_total: int


class VllmEngine:
    """One checkpoint, with adapters or without, or several fused, inside vLLM; see
    `models.engines.base.Engine`.

    vLLM's engine core runs in a process of its own. Several members are one out-of-tree vLLM model
    (`models.engines.vllm_fused`), which knows the rules mixture and product and evidence from the
    prompt; the final weights that evidence gave are not told.
    """

    def __init__(
        self,
        spec: EngineSpec,
        members: Mapping[str, ModelCard],
        traits: EngineTraits,
        *,
        engine_args: Mapping[str, Any],
        num_threads: int | None,
    ) -> None:
        """Only remember; `start` loads vLLM."""
        self._spec = spec
        self._traits = traits
        self._engine_args = engine_args
        self._num_threads = num_threads
        self._cards = dict(members)
        self._bases = [name for name, card in members.items() if card.adapter is None]
        self._adapters: dict[tuple[str, AdapterSource], LoRARequest] = {}
        self._blank: LoRARequest | None = None
        self._fused = len(self._bases) > 1
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._num_open = 0
        self._running: _Running | None = None

    @property
    def members(self) -> tuple[str, ...]:
        """The models this engine holds, in the pool's order."""
        return tuple(self._cards)

    async def start(self) -> None:
        """Start vLLM, which loads the weights. Raises `PoolError` for arguments it refuses."""
        checkpoint = self._checkpoint()
        engine_args = {**self._lora_args(), **self._engine_args}
        config = await asyncio.to_thread(
            configure, self._spec, checkpoint, engine_args, self._num_threads
        )

        from vllm.v1.engine.async_llm import AsyncLLM  # noqa: PLC0415 - takes seconds to import

        from models.engines.vllm.translate import LoadLogger  # noqa: PLC0415

        load = LoadLogger()

        card = self._cards[self._bases[0]]
        vocabulary = await asyncio.to_thread(
            Vocabulary.read, card.path, size=card.shape.vocab_size, marks=self._traits.marks
        )
        try:
            llm = AsyncLLM.from_vllm_config(config, stat_loggers=[lambda *_: load])
        except Exception as error:  # whatever its subprocess died of
            raise EngineFailed(f"engines.{self._spec.name}: vLLM did not start: {error}") from error
        self._running = _Running(
            llm=llm,
            load=load,
            vocabulary=vocabulary,
            context_tokens=config.model_config.max_model_len,
            max_running=config.scheduler_config.max_num_seqs,
            kv_bytes_total=config.cache_config.kv_cache_memory_bytes or 0,
        )
        if config.lora_config is not None and config.device_config.device_type == "cpu":
            self._blank = self._write_blank()
        await self._warm_up()

    async def _warm_up(self) -> None:
        """Have vLLM compile what it compiles at the first answer (its sampler, on CPU)."""
        first = GenerationRequest(
            request_id="warm-up",
            prompt_tokens=(0,),
            members=tuple(self._bases),
            sampling=SamplingOptions(max_tokens=1, top_logprobs=1),
        )
        async for _ in self.generate(first):
            pass

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Chunk]:
        """Stream the answer to `request`; see the contract."""
        self.check_health()
        running = self._running
        assert running is not None, "check_health raises before start"
        from vllm.exceptions import GracefulHTTPError, VLLMClientError  # noqa: PLC0415
        from vllm.inputs.engine import tokens_input  # noqa: PLC0415
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError  # noqa: PLC0415

        from models.engines.vllm import translate  # noqa: PLC0415

        for name in request.adapters.keys() - self._cards.keys():
            self._adopt(name)
        max_tokens = await check_request(
            request,
            members=self.members,
            traits=self._traits,
            context_tokens=running.context_tokens,
            vocab_size=next(iter(self._cards.values())).shape.vocab_size,
        )
        if self._num_open >= running.max_running + self._spec.max_queued_requests:
            raise EngineOverloaded(f"{self._num_open} requests run or wait already", 1.0)
        # Those asked for, unless evidence sets them, which vLLM does not tell.
        fused = len(request.members) > 1 and request.evidence is None
        weights = relative_weights(request) if fused else None
        num_top = request.sampling.top_logprobs or 0
        form = self._traits.answer_format(request.members)
        reader = AnswerReader(request, form, running.vocabulary)
        grammar = answer_grammar(request, form, running.vocabulary.terminal, opened=reader.opened)
        if grammar is not None:
            await compiled(running.vocabulary.grammars, grammar, request)
        self._num_open += 1
        try:
            params = translate.sampling_params(
                request, max_tokens=max_tokens, fused=self._fused, grammar=grammar, marks=form.marks
            )
            prompt = tokens_input(list(request.prompt_tokens))
            outputs = running.llm.generate(
                prompt,
                params,
                request.request_id,
                lora_request=await self._adapter(request),
                priority=int(request.offline),
            )
            async with aclosing(outputs):
                async for output in outputs:
                    [completion] = output.outputs
                    chunk = translate.chunk(completion, running.vocabulary, num_top)
                    if output.prompt_logprobs and request.sampling.prompt_logprobs is not None:
                        told = translate.prompt_tokens(
                            request.prompt_tokens,
                            output.prompt_logprobs,
                            running.vocabulary,
                            request.sampling.prompt_logprobs,
                        )
                        chunk = replace(chunk, prompt=told)
                    if chunk.finish_reason is not None:
                        chunk = replace(chunk, weights=weights)
                    yield reader.read(chunk)
        except (VLLMClientError, ValueError) as error:
            raise _refusal(error) from None
        except GracefulHTTPError as error:
            raise EngineOverloaded(str(error)) from None
        except EngineDeadError as error:
            raise EngineFailed(f"the engine {self._spec.name}: vLLM has died") from error
        except EngineGenerateError as error:
            raise EngineFailed(f"the engine {self._spec.name}: {error}") from error
        finally:
            self._num_open -= 1

    def stats(self) -> EngineStats:
        """Return a snapshot; cheap. Queue and cache are as of vLLM's latest step."""
        if self._running is None:
            return EngineStats()
        load = self._running.load
        queued = min(load.num_queued, self._num_open)
        used_share = load.kv_share if self._num_open else 0.0
        return EngineStats(
            running_requests=self._num_open - queued,
            queued_requests=queued,
            active_lanes=self._num_open - queued,
            kv_bytes_used=round(used_share * self._running.kv_bytes_total),
            kv_bytes_total=self._running.kv_bytes_total,
            generated_tokens_total=load.num_generated_tokens,
        )

    def metrics(self) -> str:
        """Return vLLM's own metrics (`vllm:...`) in Prometheus' text format."""
        if self._running is None:
            return ""
        from prometheus_client import CollectorRegistry, generate_latest  # noqa: PLC0415
        from vllm.v1.metrics.prometheus import get_prometheus_registry  # noqa: PLC0415

        registry: CollectorRegistry = get_prometheus_registry()
        names = [name for name in registry._names_to_collectors if name.startswith("vllm:")]
        return generate_latest(registry.restricted_registry(names)).decode()

    def check_health(self) -> None:
        """Raise `EngineFailed` if the engine cannot serve (any more)."""
        if self._running is None:
            raise EngineFailed(f"the engine {self._spec.name} is not running")
        if self._running.llm.errored:
            raise EngineFailed(f"the engine {self._spec.name}: vLLM has died")

    async def stop(self) -> None:
        """End vLLM's processes, which fails what runs; idempotent."""
        running, self._running = self._running, None
        if running is not None:
            await asyncio.to_thread(running.llm.shutdown)
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _checkpoint(self) -> Path:
        """Return the folder that vLLM loads; a temporary one that points at all the members."""
        if not self._fused:
            return self._cards[self._bases[0]].path
        from models.engines.vllm_fused.folder import write_folder  # noqa: PLC0415 - loads torch

        self._folder = tempfile.TemporaryDirectory(prefix="shoal-")
        folder = Path(self._folder.name) / _FUSED_FOLDER
        write_folder(self._cards, folder)
        return folder

    def _lora_args(self) -> dict[str, Any]:
        """Return what vLLM must know of the pool's adapters before it starts."""
        ranks = [card.adapter.largest_rank for card in self._cards.values() if card.adapter]
        if not ranks:
            return {}
        rank = next((known for known in _LORA_RANKS if known >= max(ranks)), max(ranks))
        return {"enable_lora": True, "max_loras": len(ranks) + 1, "max_lora_rank": rank}

    def _adopt(self, name: str) -> None:
        """Take a name in that an adapter of the base got since the pool was read."""
        self._cards[name] = self._cards[self._bases[0]]
        self._traits = self._traits.adopting(name, self._bases[0])

    async def _adapter(self, request: GenerationRequest) -> LoRARequest | None:
        """Return the adapter of the one member; of the base the blank one, or None.

        Raises `EngineFailed`.
        """
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        for key in adapters_of(request, self._cards).items():
            if key not in self._adapters:
                name, origin = key
                try:
                    found = await asyncio.to_thread(locate, origin.source, folder=Path())
                except PoolError as error:
                    raise EngineFailed(f"{name} cannot be loaded: {error}") from None
                number = len(self._adapters) + 2  # vLLM's, unique for as long as it runs
                added = LoRARequest(f"{name}-{number}", number, str(found.path))
                self._adapters.setdefault(key, added)
            return self._adapters[key]
        return self._blank

    def _write_blank(self) -> LoRARequest:
        """Write an adapter that adds nothing, for the base's requests on CPU.

        There vLLM's kernels take what has no adapter (index -1) for the last one's.
        """
        from vllm.lora.request import LoRARequest  # noqa: PLC0415

        base = read_tensors(self._cards[self._bases[0]].path)
        name, tensor = next((n, t) for n, t in base.items() if "layers" in n and len(t.shape) == 2)
        module = name.removesuffix(".weight")
        shrink, expand = factor_names(module)
        num_outputs, num_inputs = tensor.shape
        self._folder = tempfile.TemporaryDirectory(prefix="shoal-")
        folder = Path(self._folder.name)
        zeros = {
            shrink: np.zeros((1, num_inputs), np.float32),
            expand: np.zeros((num_outputs, 1), np.float32),
        }
        save_file(zeros, folder / ADAPTER_WEIGHTS)
        config: dict[str, Any] = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
        config["target_modules"] = [module.rpartition(".")[2]]
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
        return LoRARequest("blank", 1, str(folder))


@cache
def _socket_folder() -> tempfile.TemporaryDirectory[str]:
    """Return a folder for the sockets that vLLM leaves; it goes when this process ends."""
    return tempfile.TemporaryDirectory(prefix="shoal-")


def configure(
    spec: EngineSpec, checkpoint: Path, engine_args: Mapping[str, Any], num_threads: int | None
) -> VllmConfig:
    """Return vLLM's configuration; raises `PoolError` for arguments that it refuses."""
    # Nothing is reported to anybody; vLLM reads this when it is imported.
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if "VLLM_RPC_BASE_PATH" not in os.environ:  # a server's is its own folder
        os.environ["VLLM_RPC_BASE_PATH"] = _socket_folder().name
    from vllm import AsyncEngineArgs  # noqa: PLC0415
    from vllm.platforms import current_platform  # noqa: PLC0415

    where = f"engines.{spec.name}"
    wanted = spec.device.partition(":")[0]
    if wanted not in ("auto", current_platform.device_type):
        raise PoolError(
            f"{where}.device: {spec.device} is not there; the installed vLLM runs on "
            f"{current_platform.device_type}"
        )
    if current_platform.is_cpu():
        # Ray limits a process' threads to its num_cpus, here a scheduling weight.
        os.environ["OMP_NUM_THREADS"] = str(num_threads or os.cpu_count() or 1)
    # On a GPU, vLLM's own rule (a share of the memory) holds unless the user says otherwise.
    says_memory = "kv_memory_bytes" in spec.model_fields_set or current_platform.is_cpu()
    try:
        return AsyncEngineArgs(
            model=str(checkpoint),
            served_model_name=spec.name,
            dtype=spec.dtype,
            kv_cache_memory_bytes=spec.kv_memory_bytes if says_memory else None,
            # The one that reads our grammars.
            **{
                "structured_outputs_config": {"backend": "guidance"},
                "scheduling_policy": "priority",
                **engine_args,
            },
        ).create_engine_config()
    except (ValueError, TypeError, NotImplementedError) as error:
        raise PoolError(f"{where}.options.engine_args: vLLM refuses them: {error}") from None


def _refusal(error: Exception) -> RequestError:
    return RequestError(str(error), getattr(error, "parameter", None))
