"""`report.html`: one self-contained page that needs no network, and its plots as PNG beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from models.downscale.plots import draw_all
from models.downscale.tables import Table, all_tables

REPORT_FILE: Final = "report.html"
PLOTS_FOLDER: Final = "plots"

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; }
table { border-collapse: collapse; margin: 0.5rem 0 1.5rem; font-size: 0.85rem; }
th, td { text-align: left; padding: 0.25rem 0.7rem; border-bottom: 1px solid #ddd; }
th { border-bottom: 2px solid #888; }
.wide { overflow-x: auto; }
img { max-width: 100%; margin: 0.5rem 0; }
"""


def write_report(figures: Mapping[str, Any], folder: Path) -> None:
    """Draw the plots into `folder/plots` and write `folder/report.html` with them inside."""
    plots = draw_all(figures, folder / PLOTS_FOLDER)
    (folder / REPORT_FILE).write_text(render(figures, plots))


def render(figures: Mapping[str, Any], plots: Sequence[Path]) -> str:
    """The page."""
    title = f"Pool {figures['pool']}: from one base to {len(figures['domains'])} chunks"
    body = "".join(map(_table, all_tables(figures)[:2])) + "".join(map(_image, plots))
    body += "".join(map(_table, all_tables(figures)[2:]))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def markdown(table: Table) -> str:
    """A table for README files."""
    lines = [table.columns, ("---",) * len(table.columns), *table.rows]
    rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"## {table.title}\n\n{table.text}\n\n{rows}\n"


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
