"""Tables as text, for terminals, logs and Markdown."""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDEST = 10_000  # cells are never wrapped: lines can be searched and cut


def text_table(lines: Sequence[Sequence[str]], *, num_left: int = 1) -> str:
    """Return `lines` of cells, the first of which is the head, in aligned columns.

    The first `num_left` columns hold words, flush left; the others numbers, flush right.
    """
    head, *rows = lines
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(head):
        table.add_column(Text(name), justify="left" if index < num_left else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(file=io.StringIO(), width=_WIDEST, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return `lines` of cells, the first of which is the head, as Markdown has tables."""
    head, *rows = lines
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
