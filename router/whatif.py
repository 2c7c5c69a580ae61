"""What the ledger's traffic would have cost and been worth under a target.

Blocks: it reads the rows, those first that came first, and plays the budget controller over them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import Any

import sqlalchemy as sa

from models.pool import Pool
from policies.budget.prices import Resource
from policies.budget.simulate import RESOURCES, Clock, PastRequest, Simulation, simulate
from policies.budgeted import BudgetedSettings, make_controller
from policies.carbon.settings import LiveModels
from policies.footprint import Cost
from policies.plan import from_json, members
from router.config import AppArgs
from router.ledger.database import Database
from router.ledger.queries import ALWAYS, ANSWERED, SERVED, Period, stream
from router.ledger.schema import REQUESTS

_R = REQUESTS.c
# Of the newest requests, so that a page's question takes seconds.
MOST_REQUESTS = 20_000


def what_if(
    database: Database,
    args: AppArgs,
    pool: Pool,
    settings: BudgetedSettings,
    *,
    period: Period = ALWAYS,
    most: int = MOST_REQUESTS,
) -> Simulation:
    """Simulate `settings` over the newest `most` requests of `period` that a policy predicted.

    Rates are those of the configuration, at the intensity that its grid had, or has, then. Raises
    `PolicyError` for settings that do not fit the pool.
    """
    clock = Clock()
    models = LiveModels(
        pool.facts(),
        engine_of={model.name: model.spec.engine for model in pool.models},
        settings=args.carbon,
        economics=args.economics,
        grid=args.carbon.grid(pool.folder),
        clock=clock,
    )
    rows = list(_rows(database, period, most, models))
    ratios = _ratios(rows, models)
    return simulate(
        [past for past, _ in rows],
        models=models,
        controller=make_controller(settings, models, folder=pool.folder, clock=clock),
        clock=clock,
        ratio_of=lambda name, resource: ratios.get((name, resource), ratios["", resource]),
    )


def last_week(
    database: Database, args: AppArgs, pool: Pool, settings: BudgetedSettings
) -> Simulation:
    """Simulate `settings` over what came in the last seven days."""
    return what_if(database, args, pool, settings, period=Period(since_s=time.time() - 7 * 86400))


def _rows(
    database: Database, period: Period, most: int, models: Mapping[str, object]
) -> Iterator[tuple[PastRequest, dict[str, Any]]]:
    """Yield the requests in order of time, each with its row."""
    newest = (
        sa.select(_R.request_id)
        .where(ANSWERED, SERVED, _R.scores.is_not(None), _R.plan.is_not(None), *period.holds())
        .order_by(_R.time_s.desc())
        .limit(most)
    )
    query = sa.select(REQUESTS).where(_R.request_id.in_(newest)).order_by(_R.time_s)
    with closing(stream(database, query)) as found:
        for row in found:
            plan = from_json(row["plan"])
            # Models that the pool has no longer cannot be priced.
            scores = {name: score for name, score in row["scores"].items() if name in models}
            if scores and set(members(plan)) <= set(models):
                past = PastRequest(
                    time_s=row["time_s"],
                    prompt_tokens=row["prompt_tokens"],
                    output_tokens=row["output_tokens"],
                    scores=scores,
                    plan=plan,
                    cost=Cost(**{name: row[name] for name in RESOURCES}),
                )
                yield past, row


def _ratios(
    rows: list[tuple[PastRequest, dict[str, Any]]], models: LiveModels
) -> dict[tuple[str, Resource], float]:
    """Return what each member's answers cost over their estimates; under "" that of all together.

    Estimates are at the present intensity, so that carbon's ratio is only about as good.
    """
    logged: dict[tuple[str, Resource], float] = defaultdict(float)
    estimated: dict[tuple[str, Resource], float] = defaultdict(float)
    for _, row in rows:
        for name, tokens in (row["members"] or {}).items():
            cost = (row["costs"] or {}).get(name)
            if cost is None or name not in models:
                continue
            usual = models[name].rates.footprint(tokens["prompt_tokens"], tokens["output_tokens"])
            for resource in RESOURCES:
                for key in ((name, resource), ("", resource)):
                    logged[key] += cost[resource]
                    estimated[key] += getattr(usual, resource)
    found = {key: logged[key] / total for key, total in estimated.items() if total}
    return {**{("", resource): 1.0 for resource in RESOURCES}, **found}
