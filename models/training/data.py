"""Conversations as token ids, packed into rows of fixed length.

Shapes: `B` rows, `T` tokens a row. A row holds whole conversations; each is a *segment* that
attends only to itself and starts at position 0, exactly as at inference. It knows no tokenizer, and
nothing of where conversations come from.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_OPEN_ROWS: Final = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class TopTokens:
    """A teacher's K likeliest next tokens at each position, `[..., K]`, likeliest first."""

    ids: NDArray[np.integer[Any]]
    log_probabilities: NDArray[np.float16]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Token ids of one rendered conversation and which of them the assistant wrote.

    `teacher`, where there is one, says at each token what should come next.
    """

    tokens: Sequence[int]
    is_answer: Sequence[bool]
    teacher: TopTokens | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Packed rows, all `[B, T]`: `segments` is 0 on padding and counts conversations from 1.

    The teacher's first log-probability is positive where it says nothing.
    """

    tokens: NDArray[np.int64]
    segments: NDArray[np.int64]
    positions: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    teacher: TopTokens | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that belong to a conversation."""
        return int((self.segments > 0).sum())

    def part(self, rows: slice) -> "Rows":
        """Some of the rows."""
        return Rows(
            tokens=self.tokens[rows],
            segments=self.segments[rows],
            positions=self.positions[rows],
            targets=self.targets[rows],
            weights=self.weights[rows],
            teacher=self.teacher
            and TopTokens(
                ids=self.teacher.ids[rows],
                log_probabilities=self.teacher.log_probabilities[rows],
            ),
        )


def fill_rows(
    conversations: Iterable[Conversation], row_tokens: int
) -> Iterator[list[Conversation]]:
    """Rows of whole conversations, first-fit, while `conversations` last.

    Conversations longer than a row are left out, and so are the last, half-filled rows.
    """
    open_rows: list[list[Conversation]] = []
    used: list[int] = []
    for conversation in conversations:
        need = len(conversation.tokens)
        if need > row_tokens:
            continue
        place = next((i for i, u in enumerate(used) if u + need <= row_tokens), None)
        if place is None:
            if len(open_rows) == _OPEN_ROWS:
                fullest = max(range(len(used)), key=used.__getitem__)
                used.pop(fullest)
                yield open_rows.pop(fullest)
            open_rows.append([])
            used.append(0)
            place = len(used) - 1
        open_rows[place].append(conversation)
        used[place] += need


def pack(
    conversations: Iterator[Conversation],
    *,
    num_rows: int,
    row_tokens: int,
    question_weight: float,
) -> Rows:
    """Fill `num_rows` rows with whole conversations of an endless stream.

    The loss weight is 1 on answers (their <|end|> included) and `question_weight` on the rest;
    the last token of a segment predicts nothing.
    """
    rows = list(islice(fill_rows(conversations, row_tokens), num_rows))
    return lay_out(rows, row_tokens=row_tokens, question_weight=question_weight)


def lay_out(
    rows: Sequence[Sequence[Conversation]], *, row_tokens: int, question_weight: float
) -> Rows:
    """The arrays of rows whose conversations are known; each row must hold its own."""
    shape = (len(rows), row_tokens)
    tokens, segments = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    positions, targets = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    weights = np.zeros(shape, np.float32)
    teacher = _no_teacher(rows, shape)
    for r, row in enumerate(rows):
        start = 0
        for s, conversation in enumerate(row, 1):
            end = start + len(conversation.tokens)
            tokens[r, start:end] = conversation.tokens
            segments[r, start:end] = s
            positions[r, start:end] = np.arange(end - start)
            targets[r, start : end - 1] = conversation.tokens[1:]
            answer = np.asarray(conversation.is_answer[1:])
            weights[r, start : end - 1] = np.where(answer, 1.0, question_weight)
            if teacher is not None and conversation.teacher is not None:
                teacher.ids[r, start:end] = conversation.teacher.ids
                teacher.log_probabilities[r, start:end] = conversation.teacher.log_probabilities
            start = end
    return Rows(
        tokens=tokens,
        segments=segments,
        positions=positions,
        targets=targets,
        weights=weights,
        teacher=teacher,
    )


def _no_teacher(rows: Sequence[Sequence[Conversation]], shape: tuple[int, int]) -> TopTokens | None:
    """Room for what teachers say of these rows, silent so far; None where none says anything."""
    widths = {c.teacher.ids.shape[1] for row in rows for c in row if c.teacher is not None}
    if not widths:
        return None
    [width] = widths
    silence = np.zeros((*shape, width), np.float16)
    silence[..., 0] = 1
    return TopTokens(ids=np.zeros((*shape, width), np.int32), log_probabilities=silence)
