"""What follows the chunks' training: comparisons, measurements, laws and the pool itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from models.downscale.baselines import run_baselines
from models.downscale.fuse import measure_fused
from models.downscale.latency import measure_latency
from models.downscale.laws import fit_laws
from models.downscale.measure import BASE, run_measurements
from models.downscale.mixture import MIXTURE
from models.downscale.pruning import measure_pruning
from models.downscale.routing import train_router
from models.downscale.run import Run
from models.downscale.variants import run_variants
from models.downscale.write import write_pool


def conclude(run: Run, *, corpora: Sequence[str], taught: Sequence[str]) -> Path:
    """Run every stage after "adapt" and return the folder in which the pool stands.

    `corpora` are the stages that hold the corpora, `taught` those that the training examples of a
    chunk come from.
    """
    mixture = [MIXTURE] if run.recipe.adapt.general_share == "auto" else []
    cuts = [f"cut/{domain}" for domain in run.domains]
    run_baselines(run, upstream=[*taught, *mixture])
    variants = run_variants(run, upstream=[*cuts, *taught])
    latency = measure_latency(run, upstream=["base", cuts[0]])
    pruning = measure_pruning(run, upstream=corpora)
    names = run_measurements(run, upstream=[])
    routing = train_router(run)
    names += measure_fused(run, routed=routing is not None)
    measured = [f"measure/{name}" for name in names]
    members = [f"measure/{name}" for name in (*run.domains, BASE)]
    laws = fit_laws(run, upstream=[*members, pruning, *mixture])
    upstream = [*measured, *variants, latency, laws, *([routing] if routing else [])]
    return write_pool(run, names, routed=routing is not None, variants=variants, upstream=upstream)
