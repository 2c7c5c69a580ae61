"""`shoal replay-budget`: what a budget target would have done to a day of traffic."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from policies.budget.replay import ReplayedDay


def replay_budget(
    *,
    pool: Annotated[
        Path | None, typer.Option(help="The pool; default: the one that comes with Shoal.")
    ] = None,
    outcomes: Annotated[
        Path | None, typer.Option(help="What its models answered; default: the pool's own file.")
    ] = None,
    resource: Annotated[
        Literal["usd", "wh", "gco2e"], typer.Option(help="What the target limits.")
    ] = "gco2e",
    share: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=1,
            help="The target, between the cheapest model (0) and the best one (1) for everybody.",
        ),
    ] = 0.3,
    requests: Annotated[int, typer.Option(min=100, help="Requests in the day.")] = 5000,
    zone: Annotated[str, typer.Option(help="Grid zone whose mean the simulated grid has.")] = "DE",
    device: Annotated[str, typer.Option(help="Device of the shipped hardware table.")] = "cpu",
    adversity: Annotated[
        bool, typer.Option("--adversity", help="Also replay a cold start, a burst and the like.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of traffic and folds.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw the ordinary day to this PNG.")] = None,
) -> None:
    """Replay 24 simulated hours over real answers, with the controller and simpler strategies."""
    from models.errors import PoolError
    from models.pool import DEFAULT_POOL, load_pool
    from policies.budget.replay import replay_day
    from policies.budget.replay.days import adversarial, ordinary, target_between, workload_of
    from policies.budget.replay.replay import draw
    from policies.carbon import find_zone
    from policies.carbon.settings import CarbonSettings, DeviceSettings
    from policies.errors import PolicyError
    from policies.outcomes import read_outcomes

    folder = pool or DEFAULT_POOL
    try:
        loaded = load_pool(folder)
        answered = read_outcomes(outcomes or loaded.folder / "outcomes.jsonl")
        find_zone(zone)
        carbon = CarbonSettings(zone=zone, hardware=DeviceSettings(device=device))
        workload = workload_of(answered, loaded.facts(), carbon, seed=seed)
    except (PoolError, PolicyError, ValueError) as error:
        typer.echo(f"shoal replay-budget: {error}", err=True)
        raise typer.Exit(2) from None
    mean = find_zone(zone).gco2e_per_kwh
    usual = ordinary(workload, num_requests=requests, mean_gco2e_per_kwh=mean, seed=seed)
    target = target_between(workload, usual.day, resource, share=share)
    scenarios = [usual]
    if adversity:
        scenarios += adversarial(
            workload, num_requests=requests, mean_gco2e_per_kwh=mean, seed=seed
        )
    print(f"Target: {target.amount:.4g} {resource} per hour.")
    for scenario in scenarios:
        replayed = replay_day(
            workload,
            scenario.day,
            target,
            yesterday=scenario.yesterday,
            learned=scenario.learned,
            seed=seed,
        )
        print(f"\n{scenario.name}, {replayed.num_requests} requests\n{table(replayed)}")
        if plot is not None and scenario is usual:
            draw(replayed, plot)
            print(f"Plot: {plot}")


def table(replayed: ReplayedDay) -> str:
    """Return the results as text; quality is the predicted one, which all of them maximise."""
    lines = [
        f"{'strategy':<24} {'spent':>8} {'quality':>8} {'of optimum':>10} {'actual':>8} "
        f"{'of optimum':>10}"
    ]
    lines += [
        f"{result.name:<24} {result.spent_share:>8.2%} {result.predicted_quality:>8.4f} "
        f"{result.quality_share:>10.2%} {result.actual_quality:>8.4f} "
        f"{result.actual_quality_share:>10.2%}"
        for result in replayed.results
    ]
    return "\n".join(lines)
