"""The `tools` and `tool_choice` of a chat request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from models.tools import Tools
from router.errors import bad_request

_CHOICES = ("none", "auto", "required")


def read_tools(
    tools: Sequence[Mapping[str, Any]] | None, choice: str | Mapping[str, Any] | None
) -> Tools | None:
    """Return what may be called; None for nothing. Raises `ApiError`, 400."""
    names = [_name(tool, "tools") for tool in tools or ()]
    if isinstance(choice, Mapping):
        if _name(choice, "tool_choice") not in names:
            raise bad_request("tool_choice: it names a function that tools lack", "tool_choice")
    elif choice is not None and choice not in _CHOICES:
        raise bad_request(
            f"tool_choice: {choice!r} is unknown; allowed are {', '.join(_CHOICES)}, or a function",
            "tool_choice",
        )
    if choice == "required" and not names:
        raise bad_request("tool_choice: required needs tools", "tool_choice")
    if not tools or choice == "none":
        return None
    return Tools(functions=tuple(tools), choice="auto" if choice is None else choice)


def _name(tool: Mapping[str, Any], param: str) -> str:
    """Return the name of the function that `tool` is."""
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if tool.get("type") != "function" or not isinstance(name, str) or not name:
        raise bad_request(f"{param}: a tool is of type function and names one", param)
    return name
