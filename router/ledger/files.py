"""Writes files so that a reader sees the old one or the whole new one, never a part."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from router.ledger.errors import LedgerError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a path to write to; on leaving without an exception it becomes `target`.

    Raises `LedgerError` where the folder is missing.
    """
    if not target.parent.is_dir():
        raise LedgerError(f"{target}: there is no folder {target.parent}")
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=target.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
