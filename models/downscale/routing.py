"""The pool's own router, learnt from its members' outcomes on the router split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from models.downscale.measure import BASE, read_measured
from models.downscale.outcomes import outcomes
from models.downscale.questions import questions
from models.downscale.run import Run
from policies.encoders.registry import build_encoder
from policies.errors import PolicyError
from policies.outcomes import Outcome
from policies.routing.fit import FitSettings, fit_router
from policies.routing.router import Router, load_router, save_router

ROUTING: Final = "routing"
ROUTER_FILE: Final = "router.npz"
_PRIORS: Final = "priors.npy"
# The questions of a pool are short and few; 2^13 features of each kind tell them apart.
_ENCODER: Final = {"bits": 13}
_LEAST_PRIOR: Final = 1e-3

Floats = NDArray[np.float64]


def train_router(run: Run) -> str | None:
    """Stage "routing": `router.npz` and its expectations; None where there is too little to learn.

    What it expects on the router split comes from a router that was trained on the other half of
    that split, so that weights calibrated there hold for new questions.
    """

    def action(folder: Path) -> None:
        rows = outcomes(questions(run), read_measured(run, [*run.domains, BASE]))
        learning = [i for i, row in enumerate(rows) if row.split == "router"]
        router = _fit(run, [rows[i] for i in learning])
        save_router(router, folder / ROUTER_FILE)
        prior_QM = _qualities(run, router, rows)
        for half in (0, 1):
            other = [i for n, i in enumerate(learning) if n % 2 != half]
            mine = [i for n, i in enumerate(learning) if n % 2 == half]
            crossed = _fit(run, [rows[i] for i in other])
            prior_QM[mine] = _qualities(run, crossed, [rows[i] for i in mine])
        np.save(folder / _PRIORS, prior_QM)
        run.report(f"{ROUTING}: {router.facts['held_out']}")

    upstream = [f"measure/{name}" for name in (*run.domains, BASE)]
    facts = {"encoder": _ENCODER, "fit": asdict(_settings(run))}
    try:
        run.stages.run(ROUTING, action, settings=facts, upstream=upstream)
    except PolicyError as error:
        run.report(f"{ROUTING}: no router: {error}")
        return None
    return ROUTING


def priors(run: Run) -> Floats:
    """Each question's fusion prior over the chunks, [Q, M], rows of which sum to one."""
    quality_QM: Floats = np.load(run.stages.folder(ROUTING) / _PRIORS)
    kept = np.maximum(quality_QM, _LEAST_PRIOR)
    prior: Floats = kept / kept.sum(1, keepdims=True)
    return prior


def choices(run: Run, queries: Sequence[str]) -> list[str]:
    """The model that the router expects most of, chunks and base alike, for each query."""
    router = load_router(run.stages.folder(ROUTING) / ROUTER_FILE)
    return [router.models[m] for m in router.qualities(list(queries)).argmax(1)]


def chunk_choices(run: Run, queries: Sequence[str]) -> list[str]:
    """The chunk that the router expects most of."""
    router = load_router(run.stages.folder(ROUTING) / ROUTER_FILE)
    columns = [router.models.index(domain) for domain in run.domains]
    quality_QM = router.qualities(list(queries))[:, columns]
    return [run.domains[m] for m in quality_QM.argmax(1)]


def _fit(run: Run, rows: Sequence[Outcome]) -> Router:
    return fit_router(rows, encoder=build_encoder("ngrams", _ENCODER), settings=_settings(run))


def _settings(run: Run) -> FitSettings:
    return FitSettings(seed=run.recipe.seed)


def _qualities(run: Run, router: Router, rows: Sequence[Outcome]) -> Floats:
    columns = [router.models.index(domain) for domain in run.domains]
    return np.asarray(router.qualities([row.query for row in rows])[:, columns], np.float64)
