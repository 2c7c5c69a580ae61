"""`shoal inspect` and `shoal pull`: what a checkpoint is, and how to get one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from models.inspection import Inspection

Source = Annotated[
    str,
    typer.Argument(
        help="A folder, a .gguf file, hf:ORG/NAME[@REVISION], hf:ORG/NAME/FILE.gguf or "
        "package:DISTRIBUTION/FILE."
    ),
]


def inspect(source: Source) -> None:
    """Say what a checkpoint is and which engines can run it, without loading it."""
    from models.errors import PoolError
    from models.inspection import inspect_checkpoint
    from models.sources.locate import locate

    try:
        found = locate(source, folder=Path())
        _print(inspect_checkpoint(found.path, found.source))
    except PoolError as error:
        typer.echo(f"shoal inspect: {error}", err=True)
        raise typer.Exit(2) from None


def pull(
    source: Source,
    *,
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
) -> None:
    """Fetch a checkpoint whole into a folder, check it, and say what it is."""
    from models import inspection
    from models.errors import PoolError

    try:
        _print(inspection.pull(source, out, folder=Path()))
    except PoolError as error:
        typer.echo(f"shoal pull: {error}", err=True)
        raise typer.Exit(2) from None


def _print(found: Inspection) -> None:
    card, shape = found.card, found.card.shape
    ends = ", ".join(f"{text} ({index})" for index, text in found.end_token_texts().items())
    templates = ", ".join(sorted(found.prompts.templates))
    facts = {
        "source": card.source,
        "path": card.path,
        "architecture": shape.architecture,
        "parameters": f"{card.parameters:,}",
        "shape": f"{shape.num_layers} layers x {shape.hidden_size}, feed-forward "
        f"{shape.intermediate_size}, {shape.num_heads}/{shape.num_kv_heads} heads of "
        f"{shape.head_dim}, vocabulary {shape.vocab_size:,}",
        "context": f"{card.context_tokens:,} tokens",
        "weights": card.quantization or "floating-point numbers",
        "template": templates or "none: only /v1/completions can be asked",
        "end tokens": ends or "none",
    }
    for kind, hindrance in found.engines.items():
        facts[f"engine {kind}"] = "can run it" if hindrance is None else f"cannot: {hindrance}"
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name.ljust(width)}  {value}")
