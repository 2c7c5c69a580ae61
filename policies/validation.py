"""What pydantic refused, in sentences."""

from __future__ import annotations

from pydantic import ValidationError


def explain(error: ValidationError) -> str:
    """Return a pydantic error as sentences that name the key, the value and what is allowed."""
    lines = []
    for detail in error.errors(include_url=False):
        where = ".".join(str(part) for part in detail["loc"]) or "the file"
        if detail["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key")
        elif detail["type"] == "missing":
            lines.append(f"{where}: the key is missing")
        else:
            lines.append(f"{where}: {detail['msg']}, got {detail['input']!r}")
    return "; ".join(lines)
