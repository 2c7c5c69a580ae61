"""JSON that strangers wrote: clients, models, other servers."""

from __future__ import annotations

import json
from typing import Any, Final

UNREADABLE: Final = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
"""What comes of reading what is not as agreed: a number, too, may be larger than a float."""


def read_json_text(text: str | bytes) -> Any:  # noqa: ANN401 - any value that JSON can hold
    """Return what `text` says; raises `ValueError`, also for what is nested too deeply to read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def whole_text(text: str) -> str:
    """Return `text` with a mark for each half of a surrogate pair, which is no Unicode.

    JSON can say one, and programs that cut texts within an emoji write them.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
