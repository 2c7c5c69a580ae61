"""Functions that a client lets the model call, and calls that a model made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

FormatName: TypeAlias = Literal["hermes", "llama3-json", "mistral", "pythonic"]
"""How a model writes its calls; see `models.tool_formats`."""


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What a request offers: OpenAI's tool objects, and its `tool_choice` ("none" offers none).

    Unless `parallel`, an answer calls one function at most.
    """

    functions: tuple[Mapping[str, Any], ...]
    choice: str | Mapping[str, Any] = "auto"
    parallel: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """One call; `arguments` is JSON text as the model wrote it, which may be invalid.

    In a stream it may come in pieces, which share an `index`: the first has id and name, and all of
    them some of the arguments.
    """

    id: str
    name: str
    arguments: str
    index: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the call as OpenAI writes it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}

    def to_delta(self) -> dict[str, Any]:
        """Return the piece as OpenAI streams it."""
        if self.id:
            return {"index": self.index, **self.to_json()}
        return {"index": self.index, "function": {"arguments": self.arguments}}


def join_calls(pieces: Iterable[ToolCall]) -> tuple[ToolCall, ...]:
    """Return the whole calls that `pieces` make, in the order in which they began."""
    calls: dict[int, ToolCall] = {}
    for piece in pieces:
        begun = calls.get(piece.index)
        calls[piece.index] = (
            replace(begun, arguments=begun.arguments + piece.arguments) if begun else piece
        )
    return tuple(calls.values())
