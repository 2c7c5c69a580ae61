"""Replays 24 simulated hours over a pool's own answers: the controller beside simpler strategies.

python -m tests.bench.replay --pool my-pool --resource usd --share 0.3 --plot day.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from models.pool import DEFAULT_POOL, load_pool
from policies.carbon.grid import find_zone
from policies.carbon.settings import CarbonSettings, DeviceSettings
from policies.outcomes import read_outcomes
from router.cli.console import finite, refusing
from tests.bench.replay.days import workload_of
from tests.bench.replay.replay import draw, replay_scenarios, table_of


def main(
    *,
    pool: Annotated[
        Path, typer.Option(help="The pool; default: the one that comes with Shoal.")
    ] = DEFAULT_POOL,
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
            callback=finite,
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
    with refusing("budget replay", ValueError):
        loaded = load_pool(pool)
        answered = read_outcomes(outcomes or loaded.folder / "outcomes.jsonl")
        mean = find_zone(zone).gco2e_per_kwh
        carbon = CarbonSettings(zone=zone, hardware=DeviceSettings(device=device))
        workload = workload_of(answered, loaded.facts(), carbon, seed=seed)
    for index, (title, _, _, replayed) in enumerate(
        replay_scenarios(
            workload,
            resource=resource,
            shares=[share],
            trouble_share=share if adversity else None,
            num_requests=requests,
            mean_gco2e_per_kwh=mean,
            seed=seed,
        )
    ):
        print(f"\n{title}")
        if replayed is not None:
            print(table_of(replayed))
            if plot is not None and index == 0:
                draw(replayed, plot)
                print(f"Plot: {plot}")


if __name__ == "__main__":
    typer.run(main)
