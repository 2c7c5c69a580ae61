"""`shoal downscale`: from one checkpoint and a corpus per domain to a pool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def downscale(
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe (YAML). Left out with --quick: a toy's.")
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the new pool.")],
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on in OUT: what is done and unchanged is not redone."),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A toy pool in a few minutes, base and all.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: all cores.")
    ] = None,
) -> None:
    """Cut a base into one small chunk per domain, train them, and write a pool to serve."""
    if quick == (recipe is not None):
        typer.echo("shoal downscale: give either a recipe or --quick", err=True)
        raise typer.Exit(2)
    import torch
    from transformers.utils import logging

    from models.downscale.errors import DownscaleError
    from models.downscale.pipeline import downscale as run
    from models.downscale.progress import say
    from models.downscale.recipe import QUICK_RECIPE, read_recipe

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        pool = run(read_recipe(recipe or QUICK_RECIPE), out, resume=resume, report=say)
    except (DownscaleError, OSError) as error:
        typer.echo(f"shoal downscale: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo("shoal downscale: interrupted; --resume goes on from here", err=True)
        raise typer.Exit(130) from None
    print(f"\nPool: {pool}\nServe it: shoal serve --pool {pool}")
