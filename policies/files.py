"""Writes files so that a reader sees the old one or the whole new one, never a part."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from policies.errors import PolicyError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a path to write to; on leaving without an exception it becomes `target`.

    The path has the target's suffix, by which some libraries tell the format. Raises `PolicyError`
    where the folder is missing.
    """
    if not target.parent.is_dir():
        raise PolicyError(f"{target}: there is no folder {target.parent}")
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=target.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(target: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `target`, as `replacing` does."""
    with replacing(target) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
