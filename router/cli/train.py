"""Learn from outcomes what serving will use, and measure it: `shoal train`, `shoal evaluate`."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from policies.errors import PolicyError
from router.cli.console import SeedOption, names_in, opened, refusing

if TYPE_CHECKING:
    from policies.cascade.base import Readings
    from policies.footprint import Rates
    from policies.outcomes import Outcome
    from policies.plan import Plan

app = typer.Typer(help="Learn routers and cascades from outcomes.", no_args_is_help=True)
evaluate_app = typer.Typer(
    help="Measure what was learned on unseen outcomes.", no_args_is_help=True
)


@app.command("router")
def train_router(
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
    outside: Annotated[
        Path | None,
        typer.Option(
            help="Outcomes of queries from outside the router's field, of the same split: they "
            "teach who answers there, and make none of them familiar."
        ),
    ] = None,
    feedback: Annotated[
        str | None,
        typer.Option(help="Also the answers that users scored, from the ledger at this address."),
    ] = None,
    readers: Annotated[
        Path | None,
        typer.Option(
            help="A pool whose models read the queries, as far as their engines tell what they "
            "make of a prompt; for `kind: probing`."
        ),
    ] = None,
    models: Annotated[
        str | None, typer.Option(help="Models to route between, with commas; default: all.")
    ] = None,
    encoder: Annotated[
        str,
        typer.Option(
            help="ngrams; neural:FOLDER, n-grams and a sentence encoder's vectors; or "
            "finetuned:FOLDER, which trains that encoder end to end. FOLDER may be "
            "package:DISTRIBUTION/FOLDER, of an installed distribution."
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
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="A query's own share in its target (ZOOTER's β); default: what pays most on "
            "left-out queries and tasks.",
        ),
    ] = None,
    clusters: Annotated[int, typer.Option(min=1, help="Number of clusters, at most.")] = 32,
    seed: SeedOption = 0,
) -> None:
    """Train a router: calibrated quality of every model for any query.

    A fine-tuned encoder goes beside the router, to OUT's name ending in `.encoder`.

    With `--feedback sqlite:///shoal.db` this is also how to retrain on what users thought.
    """
    from policies.encoders.base import parse_encoder
    from policies.files import check_target
    from policies.importers.load import load_outcomes
    from policies.routing.finetune import FinetuneSettings, finetune_router
    from policies.routing.fit import FitSettings, fit_router
    from policies.routing.router import save_router

    kind, _, folder = encoder.partition(":")
    names = names_in(models)
    settings = FitSettings(num_clusters=clusters, seed=seed)
    if beta is not None:
        settings = replace(settings, betas=(beta,))
    with refusing("train router"):
        check_target(out, option="--out", suffix=".npz")
        rows = load_outcomes(outcomes, split=split)
        for extra in also or []:
            rows += load_outcomes(extra)
        if feedback is not None:
            rows += read_feedback(feedback, option="--feedback")
        if kind == "finetuned":
            if readers:
                raise PolicyError("--readers: an encoder that is trained itself takes no readings")
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
                outside=load_outcomes(outside, split=split) if outside else (),
                readings=readings_of(readers, rows) if readers else None,
            )
        save_router(trained, out)
    print(json.dumps({"out": str(out), "models": trained.models, **trained.facts}, indent=2))


def read_feedback(ledger: str, *, option: str) -> list[Outcome]:
    """Return the scored answers in the ledger at this address; an empty list where there are none.

    Raises `LedgerError` where there is no ledger; `option` is the one that named it.
    """
    from policies.outcomes import read_outcomes
    from router.ledger.export import export

    with TemporaryDirectory() as folder, opened(ledger, None, option=option) as database:
        file = Path(folder) / "feedback.jsonl"
        return read_outcomes(file) if export(database, file, format="outcomes") else []


def readings_of(pool: Path, rows: Sequence[Outcome], *, num_at_once: int = 16) -> Readings:
    """Return what the models in `rows` that are the pool's make of the queries, if they tell."""
    from router.learning.asking import read_prompts

    scored = {name for row in rows for name in row.scores}
    queries = (row.query for row in rows)
    return asyncio.run(read_prompts(pool, queries, models=scored, num_at_once=num_at_once))


@app.command("cascade")
def train_cascade(
    outcomes: Annotated[Path, typer.Argument(help="Outcomes with real generations (JSON Lines).")],
    *,
    budget: Annotated[
        str,
        typer.Option(
            help="Mean cost per query: a share of always using the dearest stage (40%), or US "
            "dollars per 1,000 queries (0.25)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where the learned cascade goes (.npz).")],
    pool: Annotated[
        Path | None, typer.Option(help="Pool file or folder, for prices; default: Shoal's own.")
    ] = None,
    split: Annotated[str, typer.Option(help="The outcomes' split to learn from.")] = "router",
    held_out: Annotated[str, typer.Option(help="The split to measure on.")] = "test",
    stage: Annotated[
        list[str] | None,
        typer.Option(
            help='A stage that is more than one model: NAME=PLAN, e.g. fused={"answer": ...}; '
            "NAME is its name in the outcomes. May be repeated."
        ),
    ] = None,
    top: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=K: of the fused stage NAME, run the K members likeliest to be right "
            "on a query. May be repeated."
        ),
    ] = None,
    prior_power: Annotated[
        float,
        typer.Option(min=0, max=100, help="Sharpens the priors that become fusion weights."),
    ] = 1.0,
    routed: Annotated[
        str | None,
        typer.Option(
            help="Models between which a query-dependent stage chooses, with commas; default: all "
            "but the dearest; empty: no such stage."
        ),
    ] = None,
    max_stages: Annotated[int, typer.Option(min=1, max=4, help="Longest chain to try.")] = 3,
    plot: Annotated[
        Path | None, typer.Option(help="The frontier's PNG; default: beside OUT.")
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Learn a FrugalGPT cascade and its whole cost-quality frontier from outcomes."""
    from models.pool import DEFAULT_POOL, load_pool
    from policies.cascade.answers import answer_table
    from policies.cascade.learn import draw, learn_cascade, render, report
    from policies.files import check_target
    from policies.importers.load import load_outcomes

    picture = plot or out.with_suffix(".png")
    with refusing("train cascade"):
        check_target(out, option="--out", suffix=".npz")
        check_target(picture, option="--plot", suffix=".png")
        facts = load_pool(pool or DEFAULT_POOL).facts()
        rates = {name: fact.rates for name, fact in facts.items()}
        train = load_outcomes(outcomes, split=split)
        answered = Counter(name for row in train for name in row.scores)
        # A model that few queries were put to would leave hardly any that all have answered.
        scored = [name for name, number in answered.items() if 2 * number >= len(train)]
        if not scored:
            raise PolicyError(
                f"{outcomes}: none of {', '.join(answered)} answered half of the "
                f"{len(train):,} queries; a cascade learns from queries that all were asked"
            )
        plans = _plans(scored, rates, stage or [])
        sizes = _sizes(top or [], plans)
        table, cost_QS = answer_table(train, plans, rates, sizes)
        if len(table.queries) < len(train):
            lacking = len(train) - len(table.queries)
            typer.echo(f"Left out: {lacking:,} of {len(train):,} that lack an answer.", err=True)
        mean_S = dict(zip(plans, cost_QS.mean(axis=0).tolist(), strict=True))
        learned = learn_cascade(
            table,
            cost_QS,
            budget=_budget_usd(budget, max(mean_S.values())),
            routed=_routed(routed, mean_S, rates),
            max_stages=max_stages,
            seed=seed,
            prior_power=prior_power,
        )
        unseen = answer_table(load_outcomes(outcomes, split=held_out), plans, rates, sizes)
        measured = report(learned, *unseen)
        learned.save(out)
        draw(measured, picture)
    print(render(measured))
    print(f"\nCascade: {out}\nPlot: {picture}")


def _plans(
    scored: Collection[str], rates: Mapping[str, Rates], stages: list[str]
) -> dict[str, Plan]:
    """Return the stages by their names in the outcomes: the pool's models in `scored`, then
    `stages`."""
    from policies.plan import Answer, from_json

    plans: dict[str, Plan] = {name: Answer(members=(name,)) for name in rates if name in scored}
    for text in stages:
        name, equals, plan = text.partition("=")
        if not equals or not name:
            raise PolicyError(f"--stage {text!r} is not NAME=PLAN")
        try:
            plans[name] = from_json(json.loads(plan))
        except json.JSONDecodeError as error:
            raise PolicyError(f"--stage {name}: the plan is not valid JSON: {error}") from None
    if not plans:
        raise PolicyError(
            f"the pool has none of the outcomes' models, {', '.join(sorted(scored))}; it has "
            f"{', '.join(rates)}. Name theirs with --pool"
        )
    return plans


def _sizes(texts: list[str], plans: Mapping[str, Plan]) -> dict[str, int]:
    from policies.cascade.learned import check_top

    sizes: dict[str, int] = {}
    for text in texts:
        name, _, size = text.partition("=")
        if not size.isdecimal():
            raise PolicyError(f"--top {text!r} is not NAME=K")
        sizes[name] = int(size)
    check_top(plans, sizes)
    return sizes


def _budget_usd(text: str, dearest_usd: float) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise PolicyError(
            f"--budget {text!r} is neither a percentage (40%) nor US dollars per 1,000 queries"
        )
    return value / 100 * dearest_usd if text.endswith("%") else value / 1000


def _routed(
    text: str | None, mean_usd: Mapping[str, float], rates: Mapping[str, Rates]
) -> list[str]:
    named = names_in(text)
    if named is not None:
        return named
    models = [name for name in mean_usd if name in rates]
    dearest = max(models, key=mean_usd.__getitem__, default=None)
    return [name for name in models if name != dearest]


@evaluate_app.callback()
def _group() -> None:
    pass


@evaluate_app.command("router")
def evaluate_router(
    file: Annotated[Path, typer.Argument(help="A router (.npz).")],
    outcomes: Annotated[
        Path,
        typer.Argument(help="Outcomes with scores for its models; see `shoal train router`."),
    ],
    *,
    split: Annotated[str | None, typer.Option(help="Measure on this split only.")] = None,
    models: Annotated[
        str | None, typer.Option(help="Choose among these models only, with commas.")
    ] = None,
    trained_on: Annotated[
        Path | None,
        typer.Option(help="Leave out queries that repeat, or nearly, one of these outcomes'."),
    ] = None,
    trained_split: Annotated[
        str | None, typer.Option(help="Of --trained-on, this split only.")
    ] = None,
    protocol: Annotated[
        Literal["folds", "tasks", "split"] | None,
        typer.Option(
            help="Train anew on: folds (four fifths), tasks (all tags but one), split (train)."
        ),
    ] = None,
    seen: Annotated[
        bool, typer.Option("--seen", help="Judge on what it was trained on, too.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the reliability diagram to this PNG.")
    ] = None,
) -> None:
    """Print accuracy, calibration and decision time of a router, beside best single and oracles.

    With `--protocol`, routers like it are trained anew on parts of the outcomes, by its own encoder
    and settings, and judged on the rest.
    """
    from policies.evaluation.judge import evaluate_protocol, evaluate_router
    from policies.evaluation.report import draw_reliability, table
    from policies.files import check_target
    from policies.importers.load import load_outcomes
    from policies.routing.fit import refit_like
    from policies.routing.router import load_router

    with refusing("evaluate router"):
        if protocol is not None and (trained_on or seen):
            option = "--trained-on" if trained_on else "--seen"
            raise PolicyError(f"{option}: --protocol {protocol} trains anew, on no test question")
        if plot is not None:
            check_target(plot, option="--plot", suffix=".png")
        if trained_split and not trained_on:
            raise PolicyError("--trained-split: there is no --trained-on whose split it could be")
        learned, rows = load_router(file), load_outcomes(outcomes, split=split)
        names = names_in(models)
        if protocol is not None:
            fit = refit_like(learned)
            report = evaluate_protocol(rows, fit=fit, protocol=protocol, models=names)
            [diagram] = [row.diagram for row in report.results if row.method == "Learned"]
        else:
            report, diagram = evaluate_router(
                learned,
                rows,
                models=names,
                trained_on=load_outcomes(trained_on, split=trained_split) if trained_on else (),
                seen=seen,
            )
        print(table(report))
        if plot is not None and diagram is not None:
            draw_reliability(diagram, report.title, plot)
            print(f"\nPlot: {plot}")
