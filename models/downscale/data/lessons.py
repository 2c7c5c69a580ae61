"""What the base would say at every token of the corpora, computed once.

Every run that distils (each chunk, each baseline, each trial) then costs as much as one that does
not: the base, eight times the size of a chunk, would else take most of every step. Only the base's
likeliest tokens are kept; the rest of its distribution is left out and the kept part renormalised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from models.training.data import Conversation, TopTokens
from models.training.score import Scorer

NUM_TOP_TOKENS: Final = 8
_IDS, _LOGS, _STARTS = "ids.npy", "log_probabilities.npy", "starts.npy"


def write_lessons(
    base: PreTrainedModel,
    corpora: Mapping[str, Sequence[Conversation]],
    folder: Path,
    *,
    scorer: Scorer,
    progress: Callable[[int], None] = lambda _: None,
    num_top: int = NUM_TOP_TOKENS,
) -> int:
    """Run the base over every distinct conversation; returns how many tokens that were.

    `scorer` is the base's. `progress` is told how many conversations each batch held.
    """
    distinct = _distinct(corpora)
    num_top = min(num_top, int(base.config.vocab_size))
    small = int(base.config.vocab_size) <= np.iinfo(np.uint16).max
    starts = np.cumsum([0, *(len(tokens) for tokens in distinct)])
    shape = (int(starts[-1]), num_top)

    def likeliest(logits: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        top = logits.log_softmax(-1).topk(num_top, dim=-1)
        return top.indices, top.values

    conversations = list(distinct.values())
    types = (np.uint16 if small else np.int32, np.float16)
    with (folder / _IDS).open("wb") as ids, (folder / _LOGS).open("wb") as logs:
        for file, dtype in zip((ids, logs), types, strict=True):
            # Written from first to last, not through a memory map: a full disk is then an error.
            facts = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, facts)
        # In pieces, so that what is in memory stays small.
        for first in range(0, len(conversations), 8192):
            part = conversations[first : first + 8192]
            for found in scorer.map(part, likeliest, progress=progress):
                for file, values, dtype in zip((ids, logs), found, types, strict=True):
                    file.write(values.astype(dtype).tobytes())
    np.save(folder / _STARTS, starts)
    return int(starts[-1])


def with_lessons(
    corpora: Mapping[str, Sequence[Conversation]], folder: Path
) -> dict[str, list[Conversation]]:
    """The same conversations with what `write_lessons` stored of them (on disk, not in memory)."""
    ids: NDArray[Any] = np.load(folder / _IDS, mmap_mode="r")
    logs: NDArray[Any] = np.load(folder / _LOGS, mmap_mode="r")
    starts = np.load(folder / _STARTS)
    distinct = _distinct(corpora)
    taught = {
        tokens: replace(
            conversation,
            teacher=TopTokens(
                ids=ids[starts[i] : starts[i + 1]],
                log_probabilities=logs[starts[i] : starts[i + 1]],
            ),
        )
        for i, (tokens, conversation) in enumerate(distinct.items())
    }
    return {
        name: [
            replace(conversation, teacher=taught[tuple(conversation.tokens)].teacher)
            for conversation in conversations
        ]
        for name, conversations in corpora.items()
    }


def _distinct(
    corpora: Mapping[str, Sequence[Conversation]],
) -> dict[tuple[int, ...], Conversation]:
    """By their tokens: the general corpus may repeat the domains'."""
    return {
        tuple(conversation.tokens): conversation
        for name in sorted(corpora)
        for conversation in corpora[name]
    }
