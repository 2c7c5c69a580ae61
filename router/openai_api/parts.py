"""An answer as a row of parts: thoughts, text, refusal, calls.

Newer APIs, Anthropic's and OpenAI's Responses, tell an answer so, one part after the other, where
chat completions tell everything at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from models.answer_format import ToolCall, join_calls
from models.engines.base import Chunk

PartKind: TypeAlias = Literal["reasoning", "text", "refusal", "call"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One part of an answer, or a piece of one: its text, or the piece of a call."""

    kind: PartKind
    text: str = ""
    call: ToolCall | None = None

    @property
    def key(self) -> tuple[PartKind, int]:
        """What pieces of the same part have in common."""
        return self.kind, self.call.index if self.call else 0


@dataclass(kw_only=True)
class PartReader:
    """Reads chunks as parts that never mix: calls beside the first one wait for the end."""

    _first_call: int | None = None
    _waiting: list[ToolCall] = field(default_factory=list)

    def read(self, chunk: Chunk) -> Iterator[Part]:
        """Yield the pieces of parts that `chunk` adds."""
        texts: tuple[tuple[PartKind, str], ...] = (
            ("reasoning", chunk.reasoning),
            ("text", chunk.text),
            ("refusal", chunk.refusal),
        )
        for kind, text in texts:
            if text:
                yield Part(kind=kind, text=text)
        yield from self._calls(chunk.tool_calls)
        if chunk.finish_reason is not None:
            for call in join_calls(self._waiting):
                yield Part(kind="call", call=call)

    def _calls(self, pieces: Iterable[ToolCall]) -> Iterator[Part]:
        for piece in pieces:
            if self._first_call is None:
                self._first_call = piece.index
            if piece.index == self._first_call:
                yield Part(kind="call", call=piece)
            else:
                self._waiting.append(piece)


def parts_of(answer: Chunk) -> list[Part]:
    """Return the parts of a whole answer."""
    return list(PartReader().read(replace(answer, finish_reason="stop")))
