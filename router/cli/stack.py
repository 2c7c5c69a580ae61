"""`shoal stack`: a pool's chunks as a folder that plain vLLM serves as one fused model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from models.card import ModelCard
    from models.pool import Pool


def stack(
    pool: Annotated[Path, typer.Argument(help="A pool.yaml, or the folder that holds one.")],
    *,
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
    models: Annotated[
        str | None,
        typer.Option(help="The members, by comma; default: all of the pool's stacked engine."),
    ] = None,
) -> None:
    """Write a folder that `vllm serve` runs as one fused ensemble (weights are not copied)."""
    from models.engines.vllm_fused.folder import write_folder
    from models.errors import PoolError
    from models.pool import load_pool

    try:
        members = _members(load_pool(pool), models.split(",") if models else None)
        write_folder(members, out)
    except PoolError as error:
        typer.echo(f"shoal stack: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(f"{out}: {', '.join(members)}; now run: vllm serve {out}")


def _members(pool: Pool, names: list[str] | None) -> dict[str, ModelCard]:
    from models.errors import PoolError

    if names is None:
        stacks = [
            pool.models_of(engine.name) for engine in pool.engines if engine.kind == "stacked"
        ]
        several = [models for models in stacks if len(models) > 1]
        if len(several) != 1:
            raise PoolError(
                f"the pool has {len(several)} stacked engines of several models; name the members "
                "with --models"
            )
        names = [model.name for model in several[0]]
    known = {model.name: model.card for model in pool.models}
    members = {name: known.get(name) for name in names}
    for name, card in members.items():
        if card is None:
            allowed = ", ".join(name for name, card in known.items() if card)
            raise PoolError(
                f"--models: {name!r} is no model with a checkpoint; allowed are {allowed}"
            )
    return {name: card for name, card in members.items() if card is not None}
