"""`shoal models`: what can be asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from router.cli.console import KeyOption, UrlOption, connect, refuse_errors

_HEADER = ("NAME", "KIND", "PARAMETERS", "USD/M IN", "USD/M OUT", "DOMAINS OR MEMBERS")


def models(
    *,
    pool: Annotated[
        Path | None, typer.Option(help="Read this pool.yaml (or its folder), not a server.")
    ] = None,
    url: UrlOption = "http://127.0.0.1:8000",
    key: KeyOption = None,
) -> None:
    """List models and policies of a running server, or the models of a pool file."""
    rows = _from_pool(pool) if pool is not None else _from_server(url, key)
    widths = [max(len(row[column]) for row in [_HEADER, *rows]) for column in range(len(_HEADER))]
    for row in [_HEADER, *rows]:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        typer.echo("  ".join(cells).rstrip())


def _from_server(url: str, key: str | None) -> list[tuple[str, ...]]:
    with connect(url, key) as client, refuse_errors(url):
        response = client.get("/v1/models")
        response.raise_for_status()
        return [_row(entry["id"], entry.get("shoal", {})) for entry in response.json()["data"]]


def _from_pool(path: Path) -> list[tuple[str, ...]]:
    from models.pool import load_pool

    try:
        loaded = load_pool(path)
    except ValueError as error:
        typer.echo(f"shoal models: {error}", err=True)
        raise typer.Exit(2) from None
    return [
        _row(
            model.name,
            {
                **model.spec.model_dump(),
                "kind": "model",
                "parameters": model.card.parameters if model.card else None,
            },
        )
        for model in loaded.models
    ]


def _row(name: str, facts: dict[str, Any]) -> tuple[str, ...]:
    is_model = facts.get("kind") == "model"
    named: Sequence[str] = facts.get("domains" if is_model else "members", ())
    return (
        name,
        str(facts.get("kind", "")),
        _millions(facts.get("parameters")),
        _price(facts.get("usd_per_million_input_tokens")),
        _price(facts.get("usd_per_million_output_tokens")),
        ", ".join(named),
    )


def _millions(parameters: int | None) -> str:
    return "" if parameters is None else f"{parameters / 1e6:,.1f} M"


def _price(usd: float | None) -> str:
    return "" if usd is None else f"{usd:g}"
