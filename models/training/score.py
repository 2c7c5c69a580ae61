"""What a model makes of given conversations: any per-token figure of its logits, in batches.

Held-out losses, a teacher's likeliest tokens, members' probabilities of the right answers and
their uncertainty are all one forward pass and a reduction.
Shapes: `B` rows, `T` tokens a row, `V` vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from models.training.data import Conversation, lay_out
from models.training.forward import compiled as compile_shapes
from models.training.forward import (
    geometry,
    low_precision,
    packed_logits,
    rotary_tables,
    to_tensors,
)

Reduction: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""From logits `[B, T, V]` and targets `[B, T]` to tensors `[B, T, ...]`."""

_ROWS: Final = 64


class Scorer:
    """Runs one model over packed rows; `dtype` is that of the matrix products."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        row_tokens: int,
        compiled: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Prepare; the model's weights must not change afterwards."""
        self._row_tokens = row_tokens
        self._device = model.device
        with torch.no_grad():
            self._weights = low_precision(model, dtype)
        cos, sin = rotary_tables(model, row_tokens)
        self._constants: dict[str, Any] = {"cos": cos, "sin": sin, "geometry": geometry(model)}
        self._forward = compile_shapes(packed_logits) if compiled else packed_logits

    @torch.no_grad()
    def map(
        self,
        conversations: Sequence[Conversation],
        reduce: Reduction,
        *,
        progress: Callable[[int], None] = lambda _: None,
    ) -> list[tuple[NDArray[Any], ...]]:
        """What `reduce` makes of each conversation, `[its tokens, ...]` per returned array.

        Position t stands for what follows token t; the last position follows the end and its
        target means nothing. `progress` is told how many conversations each batch held.

        Raises:
            ValueError: a conversation is longer than a row.
        """
        found: dict[int, tuple[NDArray[Any], ...]] = {}
        rows = _fill(conversations, self._row_tokens)
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            # Always the same shape, so that one compiled forward serves all batches.
            padded = [*part, *[[] for _ in range(min(_ROWS, len(rows)) - len(part))]]
            batch = lay_out(
                [[conversations[i] for i in row] for row in padded],
                row_tokens=self._row_tokens,
                question_weight=1.0,
            )
            tensors = to_tensors(batch, self._device)
            logits = self._forward(
                self._weights,
                tokens_BT=tensors["tokens_BT"],
                segments_BT=tensors["segments_BT"],
                positions_BT=tensors["positions_BT"],
                **self._constants,
            )
            arrays = [a.cpu().numpy() for a in reduce(logits, tensors["targets_BT"])]
            for r, row in enumerate(part):
                at = 0
                for index in row:
                    end = at + len(conversations[index].tokens)
                    found[index] = tuple(np.array(array[r, at:end]) for array in arrays)
                    at = end
            progress(sum(map(len, part)))
        return [found[index] for index in range(len(conversations))]


def _fill(conversations: Sequence[Conversation], row_tokens: int) -> list[list[int]]:
    """Rows of indices, longest conversations first, each row filled until the next is too long."""
    lengths = [len(conversation.tokens) for conversation in conversations]
    if lengths and max(lengths) > row_tokens:
        raise ValueError(f"a conversation has {max(lengths)} tokens; a row has {row_tokens}")
    rows: list[list[int]] = []
    room = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not rows or lengths[index] > room:
            rows.append([])
            room = row_tokens
        rows[-1].append(index)
        room -= lengths[index]
    return rows


def target_log_probabilities(logits: Tensor, targets: Tensor) -> tuple[Tensor]:
    """The natural-log probability of each target, `[B, T]`."""
    return (logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0],)


def answer_loss(
    conversations: Sequence[Conversation], log_probabilities: Sequence[NDArray[Any]]
) -> float:
    """Mean negative log-probability of the answers' tokens, in nats.

    `log_probabilities` are those of each conversation's targets.
    """
    total, count = 0.0, 0
    for conversation, values in zip(conversations, log_probabilities, strict=True):
        answers = np.asarray(conversation.is_answer[1:], bool)
        total -= float(values[:-1][answers].sum())
        count += int(answers.sum())
    return total / max(count, 1)
