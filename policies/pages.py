"""What reports are made of: tables for HTML and Markdown alike, plots of one style, and pages that
need nothing beside them."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from policies.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI: Final = 120
_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; font-size: 0.85rem; }
th, td { text-align: left; padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; }
.wide { overflow-x: auto; }
img { max-width: 100%; margin: 0.5rem 0; }
"""

Row = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A heading, what to know before reading, the column names and the rows."""

    title: str
    text: str
    columns: Row
    rows: tuple[Row, ...]


def page(title: str, parts: Iterable[Table | Path | str]) -> str:
    """An HTML page of tables, pictures (files) and paragraphs that needs nothing beside it."""
    body = "".join(map(_part, parts))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def _part(part: Table | Path | str) -> str:
    if isinstance(part, str):
        return f"<p>{escape(part)}</p>"
    return _table(part) if isinstance(part, Table) else _image(part)


def markdown(table: Table) -> str:
    """A table for README files."""
    return f"## {table.title}\n\n{table.text}\n\n{markdown_table([table.columns, *table.rows])}\n"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return (
        f"<h2>{escape(table.title)}</h2><p>{escape(table.text)}</p>"
        f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'
    )


def _image(plot: Path) -> str:
    data = base64.b64encode(plot.read_bytes()).decode()
    return f'<p><img alt="{escape(plot.stem)}" src="data:image/png;base64,{data}"></p>'


def new_figure(
    columns: int = 1, *, width: float = 7.5, height: float = 4.6
) -> tuple[Figure, list[Axes]]:
    """An empty figure in the reports' style, and its `columns` plots."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - half a second, for who plots alone

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, columns)))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure, axes


def png(figure: Figure) -> bytes:
    """The figure as a PNG file's content."""
    out = BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
