"""`shoal train`: learn from outcomes what serving will use."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from router.cli import cascade

if TYPE_CHECKING:
    from policies.outcomes import Outcome

app = typer.Typer(help="Learn routers and cascades from outcomes.", no_args_is_help=True)
app.command()(cascade.cascade)


@app.command()
def router(
    outcomes: Annotated[
        Path,
        typer.Argument(
            help="Outcomes (JSON Lines), or the folder of RouteLLM's MMLU answers or LLMRouter's."
        ),
    ],
    *,
    out: Annotated[Path, typer.Option(help="Where the router goes (.npz).")],
    split: Annotated[str | None, typer.Option(help="Learn from this split only.")] = None,
    also: Annotated[
        list[Path] | None,
        typer.Option(help="More outcomes. May be repeated."),
    ] = None,
    feedback: Annotated[
        str | None,
        typer.Option(help="Also the answers that users scored, from the ledger at this address."),
    ] = None,
    models: Annotated[
        str | None, typer.Option(help="Models to route between, with commas; default: all.")
    ] = None,
    encoder: Annotated[
        str,
        typer.Option(
            help="ngrams; neural:FOLDER, n-grams and a sentence encoder's vector; or "
            "finetuned:FOLDER, which trains that encoder end to end."
        ),
    ] = "ngrams",
    bits: Annotated[
        int | None, typer.Option(help="ngrams: two blocks of 2^bits features each.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="finetuned: passes over the outcomes.")] = 5,
    learning_rate: Annotated[
        float, typer.Option(help="finetuned: the highest rate; 1e-5 (large) to 5e-5 (small).")
    ] = 2e-5,
    beta: Annotated[
        float, typer.Option(min=0, max=1, help="A query's own share in its target (ZOOTER's β).")
    ] = 0.7,
    clusters: Annotated[int, typer.Option(min=1, help="Number of clusters, at most.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of folds and clusters.")] = 0,
) -> None:
    """Train a router: calibrated quality of every model for any query.

    A fine-tuned encoder goes beside the router, to OUT's name ending in `.encoder`.

    With `--feedback sqlite:///shoal.db` this is also how to retrain on what users thought.
    """
    from policies.encoders.registry import parse_encoder
    from policies.errors import PolicyError
    from policies.outcomes import load_outcomes
    from policies.routing.finetune import FinetuneSettings, finetune_router
    from policies.routing.fit import FitSettings, fit_router
    from policies.routing.router import save_router
    from router.ledger import LedgerError

    kind, _, folder = encoder.partition(":")
    names = models.split(",") if models else None
    settings = FitSettings(beta=beta, num_clusters=clusters, seed=seed)
    try:
        if not out.parent.is_dir():
            raise PolicyError(f"--out: there is no folder {out.parent}")
        rows = load_outcomes(outcomes, split=split)
        for extra in also or []:
            rows += load_outcomes(extra)
        if feedback is not None:
            rows += _feedback(feedback)
        if kind == "finetuned":
            trained = finetune_router(
                rows,
                path=folder,
                out=out.with_suffix(".encoder"),
                models=names,
                settings=settings,
                training=FinetuneSettings(epochs=epochs, learning_rate=learning_rate),
            )
        else:
            trained = fit_router(
                rows,
                encoder=parse_encoder(encoder, {} if bits is None else {"bits": bits}),
                models=names,
                settings=settings,
            )
        save_router(trained, out)
    except (PolicyError, LedgerError, OSError) as error:
        typer.echo(f"shoal train router: {error}", err=True)
        raise typer.Exit(2) from None
    print(json.dumps({"out": str(out), "models": trained.models, **trained.facts}, indent=2))


def _feedback(ledger: str) -> list[Outcome]:
    """Return the scored answers in the ledger at this address; an empty list where there are none.

    Raises `LedgerError` where there is no ledger.
    """
    from policies.outcomes import read_outcomes
    from router.cli.console import opened
    from router.ledger.export import export

    with TemporaryDirectory() as folder, opened(ledger, None, option="--feedback") as database:
        file = Path(folder) / "feedback.jsonl"
        return read_outcomes(file) if export(database, file, format="outcomes") else []
