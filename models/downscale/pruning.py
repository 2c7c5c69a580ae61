"""P2's measurements: how the loss after a cut depends on what is kept and on the training since."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final, TypedDict

from models.downscale.architecture import num_parameters
from models.downscale.cut import cut
from models.downscale.errors import BaseError
from models.downscale.recipe import MemberShape
from models.downscale.run import GENERAL, Run
from models.downscale.shapes import solve_shape
from models.downscale.stage import write_json
from models.downscale.trials import NUM_JUDGED, trial, trial_facts
from models.tasks import Split

PRUNING: Final = "pruning"
PRUNING_FILE: Final = "pruning.json"


class PruningPoint(TypedDict):
    """The held-out loss, in nats per answer token, of one cut after so many training tokens."""

    kept_share: float
    base_parameters: int
    tokens: int
    base_loss: float
    loss: float


def measure_pruning(run: Run, *, upstream: Sequence[str]) -> str:
    """Stage "pruning": the base cut to several sizes for the first domain, each trained shortly."""
    recipe = run.recipe
    domain = run.domains[0]

    def action(folder: Path) -> None:
        judged = run.conversations(domain, Split.ROUTER)[:NUM_JUDGED]
        base_parameters = num_parameters(run.base)
        base_loss = run.loss(run.base, judged)
        points: list[PruningPoint] = []
        for share in recipe.laws.pruning_shares:
            try:
                shape = solve_shape(run.base.config, round(share * base_parameters), MemberShape())
            except BaseError as error:
                run.report(f"{PRUNING}: no cut keeps {share:.1%}: {error}")
                continue
            member, report = cut(run.base, run.importance(domain), shape)
            found = trial(
                member,
                run.conversations(domain),
                run.conversations(GENERAL),
                {"loss": partial(run.loss, conversations=judged)},
                general_share=0.1,
                after_tokens=recipe.laws.pruning_tokens,
                settings=recipe.adapt,
                seed=recipe.seed,
                distill=False,
            )
            points += [
                PruningPoint(
                    kept_share=report.parameters / base_parameters,
                    base_parameters=base_parameters,
                    tokens=one.tokens,
                    base_loss=base_loss,
                    loss=one.losses["loss"],
                )
                for one in found
            ]
            run.report(f"{PRUNING}: {share:.1%} kept: {points[-1]['loss']:.4f}")
        write_json(folder / PRUNING_FILE, {"domain": domain, "points": points})

    facts = {
        "shares": recipe.laws.pruning_shares,
        "tokens": recipe.laws.pruning_tokens,
        "adapt": trial_facts(recipe.adapt),
        "seed": recipe.seed,
    }
    needs = ["base", f"calibrate/{domain}", *upstream]
    run.stages.run(PRUNING, action, settings=facts, upstream=needs)
    return PRUNING


def read_pruning(run: Run) -> list[PruningPoint]:
    """What the stage found."""
    file = run.stages.folder(PRUNING) / PRUNING_FILE
    points: list[PruningPoint] = json.loads(file.read_text())["points"]
    return points
