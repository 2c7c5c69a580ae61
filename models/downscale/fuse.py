"""All chunks fused token by token, with weights of each kind, on the test questions.

uniform    equal weights
evidence   w_m ∝ exp(l_m / T): how likely each chunk finds the question
routed     w_m ∝ prior_m^κ · exp(l_m / T), the prior being the learned router's
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from models.downscale.measure import (
    Measured,
    answer_odds,
    as_shipped,
    measure_settings,
    prompts,
    read_measured,
    write_measured,
)
from models.downscale.progress import progress_bar
from models.downscale.questions import Question, questions, texts
from models.downscale.routing import ROUTING, priors
from models.downscale.run import Run
from models.downscale.stage import write_json
from models.training.generate import complete_fused
from policies.evidence import Calibration, HeldOutAnswers, calibrate, evidence_weights

Floats = NDArray[np.float64]

FUSED: Final = "fused-"
_CALIBRATION: Final = "calibration.json"


def measure_fused(run: Run, *, routed: bool) -> list[str]:
    """Stages "measure/fused-<weights>"; returns the names. `routed` says if there is a router."""
    kinds = ["uniform", "evidence", *(["routed"] if routed else [])]
    for kind in kinds:
        _measure(run, kind)
    return [f"{FUSED}{kind}" for kind in kinds]


def weights_of(run: Run, kind: str, asked: Sequence[Question]) -> tuple[Floats, Calibration | None]:
    """Fusion weights of each question over the chunks, [Q, M], and what they were calibrated to."""
    members = read_measured(run, run.domains)
    prompt_QM = prompts(members)
    uniform_QM = np.full_like(prompt_QM, 1 / len(members))
    if kind == "uniform":
        return uniform_QM, None
    prior_QM = uniform_QM if kind == "evidence" else priors(run)
    found = _calibrate(asked, members, prior_QM)
    weights_QM = evidence_weights(
        prior_QM, prompt_QM, temperature=found.temperature, prior_power=found.prior_power
    )
    return weights_QM, found


def read_calibration(run: Run, kind: str) -> dict[str, Any]:
    """The temperature and prior power of a fusion that was measured."""
    file = run.stages.folder(f"measure/{FUSED}{kind}") / _CALIBRATION
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def _measure(run: Run, kind: str) -> None:
    name = f"{FUSED}{kind}"

    def action(folder: Path) -> None:
        asked = questions(run)
        weights_QM, found = weights_of(run, kind, asked)
        if found is not None:
            write_json(folder / _CALIBRATION, asdict(found))
        tests = [i for i, question in enumerate(asked) if question.is_test]
        mine = [asked[i] for i in tests]
        with progress_bar(len(mine), f"measure/{name}", unit="questions") as advance:
            completions = complete_fused(
                [as_shipped(run.chunk(domain)) for domain in run.domains],
                run.tokenizer,
                texts(mine),
                weights_QM=weights_QM[tests],
                max_new_tokens=run.recipe.measure.max_new_tokens,
                progress=advance,
            )
        write_measured(run, name, folder, indices=tests, asked=mine, completions=completions)

    upstream = [f"measure/{domain}" for domain in run.domains]
    upstream += [ROUTING] if kind == "routed" else []
    run.stages.run(f"measure/{name}", action, settings=measure_settings(run), upstream=upstream)


def _calibrate(
    asked: Sequence[Question], members: dict[str, Measured], prior_QM: Floats
) -> Calibration:
    """Those under which the right answers of the router split are likeliest."""
    rows = [i for i, question in enumerate(asked) if not question.is_test]
    return calibrate(
        HeldOutAnswers(
            answer_QTM=answer_odds(members)[rows],
            prompt_QM=prompts(members)[rows],
            prior_QM=prior_QM[rows],
        )
    )
