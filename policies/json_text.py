"""JSON that strangers wrote: clients, models, other servers."""

from __future__ import annotations

import json
from typing import Any


def read_json_text(text: str | bytes) -> Any:  # noqa: ANN401 - any value that JSON can hold
    """Return what `text` says; raises `ValueError`, also for what is nested too deeply to read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
