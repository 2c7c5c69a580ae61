"""vLLM's logits processor that hears which requests want which fusion.

It edits no logits: fusing needs every member's, which only the model has. vLLM calls
`validate_params` in the API server (a `ValueError` becomes status 400) and the rest in the worker.
"""

from __future__ import annotations

import copyreg
from abc import ABCMeta
from typing import ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor

from models.engines.vllm_fused.request import read_request
from models.engines.vllm_fused.table import FusionTable


class _BoundType(ABCMeta):
    """The type of classes made by `bind`: pickled as the call that makes them anew."""


class FusionProcessor(LogitsProcessor, metaclass=_BoundType):  # type: ignore[misc]
    """Keeps the worker's `FusionTable`; see the module's docstring."""

    members: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse what cannot be run; ask for what evidence needs."""
        asked = read_request(sampling_params.extra_args, cls.members)
        if asked is None:
            return
        if sampling_params.prompt_logprobs is not None:
            raise ValueError(
                "prompt_logprobs (echo with logprobs) are those of the uniform mixture and cannot "
                "be combined with shoal_* arguments"
            )
        if asked.evidence is not None:
            # What is read from the prefix cache is not computed, and then not heard.
            sampling_params.skip_reading_prefix_cache = True

    def __init__(
        self,
        vllm_config: VllmConfig,
        device: torch.device,
        is_pin_memory: bool,  # noqa: ARG002 - vLLM passes it
    ) -> None:
        self._table = FusionTable.of(vllm_config, self.members, device)

    def is_argmax_invariant(self) -> bool:
        """Say that it changes nothing."""
        return True

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Pass on how the batch changed."""
        self._table.begin_step(batch_update)

    def apply(self, logits: Tensor) -> Tensor:
        """Return `logits` as they are."""
        return logits


def bind(members: tuple[str, ...]) -> type[FusionProcessor]:
    """Return the processor for an ensemble of `members`; vLLM wants a class, not an object."""
    bound: type[FusionProcessor] = _BoundType(
        FusionProcessor.__name__, (FusionProcessor,), {"members": members}
    )  # type: ignore[assignment]
    return bound


def _reduce(cls: type[FusionProcessor]) -> str | tuple[object, tuple[object, ...]]:
    return (bind, (cls.members,)) if cls.members else cls.__qualname__


copyreg.pickle(_BoundType, _reduce)  # type: ignore[arg-type]
