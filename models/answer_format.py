"""What a model writes beside its answer's text: thoughts and calls, and how a template shows it;
and the functions that a client lets it call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

from pydantic import Field

from policies.kinds import Strict

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


class ReasoningTags(Strict):
    """What a model's thoughts stand between; both texts are literal."""

    open: str = Field(min_length=1, max_length=64)
    close: str = Field(min_length=1, max_length=64)


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """How a model calls tools, and what its reasoning stands between; None: it does not."""

    calls: FormatName | None = None
    reasoning: ReasoningTags | None = None

    @property
    def marks(self) -> tuple[str, ...]:
        """Tags to be read even where the tokenizer has them as special tokens, without text."""
        tags = self.reasoning
        return (*_MARKS.get(self.calls or "", ()), *((tags.open, tags.close) if tags else ()))


PLAIN: Final = AnswerFormat()

_MARKS: Final[dict[str, tuple[str, ...]]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3-json": ("<|python_tag|>",),
    "mistral": ("[TOOL_CALLS]", "[ARGS]"),
    "pythonic": ("<|python_start|>", "<|python_end|>"),
}
# What a template shows that has its model write calls so; the first that fits counts.
_CALLS: Final[tuple[tuple[str, FormatName], ...]] = (
    ("[TOOL_CALLS]", "mistral"),
    ("<tool_call>", "hermes"),
    ("[func_name1(", "pythonic"),
    ('"parameters": ', "llama3-json"),
)
# Other formats have the same tags.
_OTHERS: Final = ("<function=", "<arg_key>")
_REASONING: Final = (
    ReasoningTags(open="<think>", close="</think>"),
    ReasoningTags(open="[THINK]", close="[/THINK]"),
    ReasoningTags(open="<seed:think>", close="</seed:think>"),
)


def detect_format(templates: Iterable[str]) -> AnswerFormat:
    """Return what chat templates tell of their model's answers."""
    text = "\n".join(templates)
    known = "tools" in text and not any(other in text for other in _OTHERS)
    calls = [name for shown, name in _CALLS if known and shown in text]
    reasoning = [tags for tags in _REASONING if tags.close in text]
    return AnswerFormat(
        calls=calls[0] if calls else None, reasoning=reasoning[0] if reasoning else None
    )
