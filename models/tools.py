"""Functions that a client lets the model call, and calls that a model made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What a request offers: OpenAI's tool objects, and its `tool_choice` ("none" offers none)."""

    functions: tuple[Mapping[str, Any], ...]
    choice: str | Mapping[str, Any] = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """One call; `arguments` is JSON text as the model wrote it, which may be invalid."""

    id: str
    name: str
    arguments: str

    def to_json(self) -> dict[str, Any]:
        """Return the call as OpenAI writes it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}
