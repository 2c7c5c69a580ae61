"""Which fusion each row of vLLM's batch wants: heard by a logits processor, kept for the model.

vLLM tells its logits processors how the batch changes, before every step, and asks the model for
logits of the batch's rows in that order, after it. `FusionProcessor` edits no logits, since fusing
needs every member's, which only the model has; it keeps the `FusionTable` that the model reads.
vLLM calls its `validate_params` in the API server (a `ValueError` becomes status 400) and the rest
in the worker.

Shapes: R rows (requests of the batch), M members.
"""

from __future__ import annotations

import copyreg
from abc import ABCMeta
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor

from models.engines.stacked.fusion import LaneWeights
from models.engines.vllm_fused.request import FusionRequest, read_request

# Where the table is in what vLLM shares between the parts of one worker.
_KEY = "shoal.fusion_table"


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """Weights of every row (they sum to one); `product_R1` None means that all rows mix."""

    weights_RM: Tensor
    product_R1: Tensor | None


class Row:
    """One request of the batch that asked for something of its own; its prompt's tokens may be
    `scored`, each under what came before it.
    """

    def __init__(self, asked: FusionRequest, prompt: Sequence[int], *, scored: bool) -> None:
        self.product = asked.product
        self.scored = scored
        self.evidence = asked.evidence is not None
        self._weights = self._scoring = LaneWeights(asked.weights, asked.evidence)
        self._prompt = prompt
        self._num_read = 0 if self.evidence or scored else len(prompt)

    @property
    def weights(self) -> tuple[float, ...]:
        """What its members weigh by now."""
        return self._weights.values

    @property
    def is_reading(self) -> bool:
        """Whether tokens of its prompt still have to be heard as evidence, or scored."""
        return self._num_read < len(self._prompt) - 1

    def following(self, position: int, num_tokens: int) -> Sequence[int]:
        """Return the prompt's tokens after each of `num_tokens` from `position` on."""
        return self._prompt[position + 1 : position + 1 + num_tokens]

    def hear(self, log_likelihood_M: Sequence[float], num_tokens: int) -> None:
        """Take in what each member says of the prompt's next `num_tokens` tokens."""
        self._weights = self._weights.heard(log_likelihood_M, num_tokens)

    def read_to(self, position: int) -> None:
        """Note that the tokens up to `position` have been seen."""
        self._num_read = position

    def scoring(self, said_TM: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
        """Return the weights under which each of the prompt's next tokens counts, [T, M]: what the
        members said of those before it has set them.
        """
        found = []
        for said_M in said_TM:
            found.append(self._scoring.values)
            self._scoring = self._scoring.heard(said_M, 1)
        return found


class FusionTable:
    """The rows that differ from the default (a uniform mixture), and what they become as tensors.

    Not thread-safe: vLLM's worker is one thread.
    """

    def __init__(self, members: Sequence[str], device: torch.device) -> None:
        self._members = tuple(members)
        self._device = device
        self._uniform_1M = torch.full((1, len(members)), 1 / len(members), device=device)
        self._rows: dict[int, Row] = {}
        self._fusion: Fusion | None = None
        self._step_pending = False
        self.scored: dict[int, tuple[Row, int]] = {}
        """Of this step's prompts that are scored, by the step's token at which each begins: whose
        it is, and its place in that prompt."""

    @staticmethod
    def of(config: VllmConfig, members: Sequence[str], device: torch.device) -> FusionTable:
        """Return this worker's table: processor and model, made apart, must share one."""
        shared = config.compilation_config.static_forward_context
        table = shared.setdefault(_KEY, FusionTable(members, device))
        assert isinstance(table, FusionTable)
        return table

    def begin_step(self, update: BatchUpdate | None) -> None:
        """Take in how the batch changed; the next `take` is for its rows."""
        if process_dict_updates(self._rows, update, self._admit) or update:
            self._fusion = None
        self._step_pending = True
        self.scored.clear()

    def take(self, num_rows: int) -> Fusion | None:
        """Return how to fuse the `num_rows` rows of the batch; None for others.

        vLLM asks once per step for the rows of the batch. Whatever else it asks for (warm-up, the
        log-probabilities of a prompt) is not of the batch.
        """
        of_batch, self._step_pending = self._step_pending, False
        if not of_batch:
            return None
        if not self._rows:
            return self.uniform(num_rows)
        if self._fusion is None:
            self._fusion = self._as_tensors(num_rows)
        return self._fusion

    def uniform(self, num_rows: int) -> Fusion:
        """Return how to fuse rows of which nobody said anything."""
        return Fusion(weights_RM=self._uniform_1M.expand(num_rows, -1), product_R1=None)

    def fusion_of(self, row: Row, said_TM: Sequence[Sequence[float]]) -> Fusion:
        """Return how to fuse what predicts the next tokens of the prompt of `row`, of which the
        members say `said_TM`.
        """
        weights_TM = torch.tensor(row.scoring(said_TM), device=self._device)
        product_T1 = torch.ones_like(weights_TM[:, :1], dtype=torch.bool) if row.product else None
        return Fusion(weights_RM=weights_TM, product_R1=product_T1)

    def reading(self) -> Iterator[tuple[int, Row]]:
        """Yield the batch's places of rows whose prompts are heard or scored in this step."""
        self._fusion = None
        for place, row in self._rows.items():
            if row.is_reading:
                yield place, row

    @property
    def is_reading(self) -> bool:
        """Whether any row's prompt is still to be heard or scored."""
        return any(row.is_reading for row in self._rows.values())

    def _admit(
        self, params: SamplingParams, prompt: list[int] | None, _answer: list[int]
    ) -> Row | None:
        asked = read_request(params.extra_args, self._members)
        scored = params.prompt_logprobs is not None
        return None if asked is None else Row(asked, prompt or [], scored=scored)

    def _as_tensors(self, num_rows: int) -> Fusion:
        uniform = (1 / len(self._members),) * len(self._members)
        rows = [self._rows.get(index) for index in range(num_rows)]
        products = [bool(row and row.product) for row in rows]
        return Fusion(
            weights_RM=torch.tensor([row.weights if row else uniform for row in rows]).to(
                self._device
            ),
            product_R1=torch.tensor(products)[:, None].to(self._device) if any(products) else None,
        )


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
