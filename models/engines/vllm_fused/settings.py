"""What vLLM must be told, by its own hooks, to run a fused folder without any further argument."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from vllm.config import CUDAGraphMode, ModelConfig, VllmConfig
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from models.card import ModelCard
from models.engines.vllm_fused.folder import read_members
from models.engines.vllm_fused.processor import bind

LOAD_FORMAT = "shoal_fused"
# Formats that mean: read the checkpoint.
_REPLACED_FORMATS = ("auto", "hf", "safetensors")
# vLLM's kernel on CPU keeps a block's keys column by column. Where heads are many and small, blocks
# of 32 tokens are read and written a quarter faster than its own choice of 128.
_CPU_BLOCK_TOKENS = 32


class TakesMembers(Protocol):
    """The fused model, as far as loading goes."""

    def load_members(self, cards: Sequence[ModelCard]) -> None:
        """Load the members' weights."""
        ...


class FusedSettings(VerifyAndUpdateConfig):  # type: ignore[misc]
    """vLLM calls these once, where its configuration is made."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:  # noqa: ARG004 - vLLM's
        """Choose the first model runner, before anything of the configuration depends on it.

        The second one has another interface for logits processors (docs/vllm.md).
        """
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Set loader, logits processor and model runner; `ValueError` for what cannot work."""
        model, load = vllm_config.model_config, vllm_config.load_config
        members = read_members(Path(model.model))
        ranks = vllm_config.parallel_config.tensor_parallel_size
        if len(members) % ranks:
            raise ValueError(
                f"tensor_parallel_size {ranks} must divide the {len(members)} members of "
                f"{model.model}: each rank holds whole members"
            )
        if vllm_config.speculative_config is not None:
            raise ValueError("a fused ensemble cannot be combined with speculative decoding")
        if vllm_config.compilation_config.cudagraph_mode == CUDAGraphMode.FULL:
            raise ValueError(
                "cudagraph_mode FULL would freeze prompts too; use FULL_AND_PIECEWISE, "
                "FULL_DECODE_ONLY, PIECEWISE or NONE"
            )
        if load.load_format in _REPLACED_FORMATS:
            load.load_format = LOAD_FORMAT
        cache = vllm_config.cache_config
        if current_platform.is_cpu() and not cache.user_specified_block_size:
            cache.block_size, cache.user_specified_block_size = _CPU_BLOCK_TOKENS, True
        model.logits_processors = [*(model.logits_processors or ()), bind(tuple(members))]


class MembersLoader(BaseModelLoader):  # type: ignore[misc]
    """Loads a fused model from the folders of its members."""

    def download_model(self, model_config: ModelConfig) -> None:
        """Do nothing: members are folders on this machine."""

    def load_weights(self, model: TakesMembers, model_config: ModelConfig) -> None:
        """Let the model take the weights of its members."""
        model.load_members(list(read_members(Path(model_config.model)).values()))
