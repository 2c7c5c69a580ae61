"""`shoal train cascade`: learn which chains pay, and when an answer is good enough."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from policies.footprint import Rates
    from policies.plan import Plan


def cascade(
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
        float, typer.Option(min=0, help="Sharpens the priors that become fusion weights.")
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
    seed: Annotated[int, typer.Option(help="Seed of the folds.")] = 0,
) -> None:
    """Learn a FrugalGPT cascade and its whole cost-quality frontier from outcomes."""
    from models.errors import PoolError
    from models.pool import DEFAULT_POOL, load_pool
    from policies.cascade.answers import answer_table
    from policies.cascade.learn import learn_cascade
    from policies.cascade.report import draw, render, report
    from policies.errors import PolicyError
    from policies.outcomes import read_outcomes

    try:
        facts = load_pool(pool or DEFAULT_POOL).facts()
        rates = {name: fact.rates for name, fact in facts.items()}
        train = read_outcomes(outcomes, split=split)
        plans = _plans(train[0].scores, rates, stage or [])
        sizes = _sizes(top or [], plans)
        table, cost_QS = answer_table(train, plans, rates, sizes)
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
        unseen = answer_table(read_outcomes(outcomes, split=held_out), plans, rates, sizes)
        measured = report(learned, *unseen)
    except (PolicyError, PoolError) as error:
        typer.echo(f"shoal train cascade: {error}", err=True)
        raise typer.Exit(2) from None
    learned.save(out)
    picture = plot or out.with_suffix(".png")
    draw(measured, picture)
    print(render(measured))
    print(f"\nCascade: {out}\nPlot: {picture}")


def _plans(
    scored: Mapping[str, float], rates: Mapping[str, Rates], stages: list[str]
) -> dict[str, Plan]:
    """Return the stages by their names in the outcomes: the pool's scored models, then `stages`."""
    from policies.errors import PolicyError
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
    return plans


def _sizes(texts: list[str], plans: Mapping[str, Plan]) -> dict[str, int]:
    from policies.cascade.learned import check_top
    from policies.errors import PolicyError

    sizes: dict[str, int] = {}
    for text in texts:
        name, _, size = text.partition("=")
        if not size.isdecimal():
            raise PolicyError(f"--top {text!r} is not NAME=K")
        sizes[name] = int(size)
    check_top(plans, sizes)
    return sizes


def _budget_usd(text: str, dearest_usd: float) -> float:
    from policies.errors import PolicyError

    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100 * dearest_usd
        return float(text) / 1000
    except ValueError:
        raise PolicyError(
            f"--budget {text!r} is neither a percentage (40%) nor US dollars per 1,000 queries"
        ) from None


def _routed(
    text: str | None, mean_usd: Mapping[str, float], rates: Mapping[str, Rates]
) -> list[str]:
    if text is not None:
        return [name.strip() for name in text.split(",") if name.strip()]
    models = [name for name in mean_usd if name in rates]
    dearest = max(models, key=mean_usd.__getitem__, default=None)
    return [name for name in models if name != dearest]
