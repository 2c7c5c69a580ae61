"""Pools and checkpoints: `shoal downscale`, `shoal stack`, `shoal inspect` and `shoal pull`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from models.errors import PoolError
from router.cli.console import refusing

if TYPE_CHECKING:
    from models.adapter import Adapter
    from models.card import ModelCard
    from models.inspection import Inspection
    from models.pool import Pool


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

    from models.downscale.pipeline import downscale as run
    from models.downscale.recipe import QUICK_RECIPE, read_recipe
    from models.downscale.stage import say

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if threads is not None:
        torch.set_num_threads(threads)
    with refusing("downscale"):
        try:
            pool = run(read_recipe(recipe or QUICK_RECIPE), out, resume=resume, report=say)
        except KeyboardInterrupt:
            typer.echo("shoal downscale: interrupted; --resume goes on from here", err=True)
            raise typer.Exit(130) from None
    print(f"\nPool: {pool}\nServe it: shoal serve --pool {pool}")


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
    from models.pool import load_pool

    with refusing("stack"):
        members = _members(load_pool(pool), models.split(",") if models else None)
        write_folder(members, out)
    typer.echo(f"{out}: {', '.join(members)}; now run: vllm serve {out}")


def _members(pool: Pool, names: list[str] | None) -> dict[str, ModelCard]:
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
        if card is None or card.adapter is not None:
            allowed = ", ".join(name for name, card in known.items() if card and not card.adapter)
            raise PoolError(
                f"--models: {name!r} is no model with a checkpoint of its own; allowed are "
                f"{allowed}"
            )
    return {name: card for name, card in members.items() if card is not None}


Source = Annotated[
    str,
    typer.Argument(
        help="A folder, a .gguf file, hf:ORG/NAME[@REVISION], hf:ORG/NAME/FILE.gguf or "
        "package:DISTRIBUTION/FILE."
    ),
]


def inspect(
    source: Source,
    *,
    base: Annotated[
        str | None, typer.Option(help="Of an adapter: the base to hold it against, such a source.")
    ] = None,
) -> None:
    """Say what a checkpoint or an adapter is and which engines can run it, without loading it."""
    from models.adapter import read_adapter
    from models.inspection import look_at
    from models.sources.locate import locate

    with refusing("inspect"):
        found = locate(source, folder=Path())
        if base is None:
            _print(look_at(found.path, found.source))
            return
        checkpoint = locate(base, folder=Path()).path
        _print(read_adapter(found.path, checkpoint, source=found.source))


def pull(
    source: Source,
    *,
    out: Annotated[Path, typer.Option(help="The folder to write; it must not exist.")],
) -> None:
    """Fetch a checkpoint or an adapter whole into a folder, check it, and say what it is."""
    from models import inspection

    with refusing("pull"):
        _print(inspection.pull(source, out, folder=Path()))


def _print(found: Inspection | Adapter) -> None:
    from models.adapter import Adapter

    facts = _adapter_facts(found) if isinstance(found, Adapter) else _facts(found)
    width = max(map(len, facts))
    for name, value in facts.items():
        typer.echo(f"{name.ljust(width)}  {value}")


def _adapter_facts(adapter: Adapter) -> dict[str, object]:
    from models.engines.registry import adapter_kinds

    kinds = Counter(module.split(".", 3)[-1] for module in adapter.scales)
    scales = sorted(set(adapter.scales.values()))
    return {
        "source": adapter.origin.source,
        "path": adapter.path,
        "kind": f"low-rank adapter of {adapter.base_name or 'a base that it does not name'}",
        "parameters": f"{adapter.parameters:,}",
        "rank": f"{adapter.largest_rank} at most",
        "scale": " to ".join(f"{scale:g}" for scale in dict.fromkeys((scales[0], scales[-1]))),
        "modules": ", ".join(f"{kind} ({count} layers)" for kind, count in sorted(kinds.items())),
        "sha256": adapter.origin.sha256,
        "engines": f"those of its base, if of kind {', '.join(adapter_kinds())}",
    }


def _facts(found: Inspection) -> dict[str, object]:
    card, shape = found.card, found.card.shape
    ends = ", ".join(f"{text} ({index})" for index, text in found.end_token_texts().items())
    templates = ", ".join(sorted(found.prompts.templates))
    facts: dict[str, object] = {
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
        "sampling": ", ".join(f"{key} {value:g}" for key, value in card.sampling.items())
        or "as requests say",
    }
    for kind, hindrance in found.engines.items():
        facts[f"engine {kind}"] = "can run it" if hindrance is None else f"cannot: {hindrance}"
    return facts
