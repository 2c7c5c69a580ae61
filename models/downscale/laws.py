"""The pool's own laws: fitted to what was measured, with bootstrap intervals, and checked.

Everything that a reader may doubt is kept: the points behind each fit, its R² and its intervals.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.downscale.architecture import num_parameters
from models.downscale.ensemble import (
    Curve,
    Floats,
    answer_rows,
    explained,
    fit_curve,
    subset_errors,
    subset_losses,
    subsets,
)
from models.downscale.fuse import weights_of
from models.downscale.measure import (
    BASE,
    Measured,
    answer_odds,
    as_shipped,
    read_measured,
)
from models.downscale.mixture import MIXTURE, MIXTURE_FILE, read_mixture
from models.downscale.pruning import read_pruning
from models.downscale.questions import Question, questions
from models.downscale.run import Run
from models.downscale.stage import write_json
from models.training.score import Scorer
from policies.errors import LawError
from policies.laws import EnsembleLaw, Fitted, MixtureLaw, PostPruningLaw, ensemble_margin
from policies.laws.ensemble import smallest_winning_ensemble
from policies.laws.file import LAWS_FILE, PoolLaws, write_laws

LAWS: Final = "laws"
FITS_FILE: Final = "fits.json"
WEIGHTINGS: Final = ("uniform", "evidence")
# Positions times vocabulary of the members' whole distributions that are held in memory at once.
_MOST_ELEMENTS: Final = 2**22


def fit_laws(run: Run, *, upstream: Sequence[str]) -> str:
    """Stage "laws": `laws.npz`, which serving reads, and `fits.json`, which the report shows."""

    def action(folder: Path) -> None:
        asked = questions(run)
        members = read_measured(run, run.domains)
        base = read_measured(run, [BASE])[BASE]
        curves = _curves(run, asked, members)
        pruning = _fit_pruning(run)
        mixture = _mixture(run)
        fits: dict[str, Any] = {
            "curves": {key: _curve_json(curve) for key, curve in curves.items()},
            "pruning": pruning and {**asdict(pruning), "points": read_pruning(run)},
            "mixture": mixture,
        }
        overall = curves["loss/evidence/all"]
        fits["proposition"] = proposition(
            overall,
            pruning,
            base_parameters=num_parameters(run.base),
            base_loss=float(base.losses[_tests(asked)].mean()),
        )
        write_json(folder / FITS_FILE, fits)
        write_laws(folder / LAWS_FILE, _pool_laws(run, curves, pruning, mixture))

    facts = {"laws": run.recipe.laws.model_dump(), "seed": run.recipe.seed}
    run.stages.run(LAWS, action, settings=facts, upstream=upstream)
    return LAWS


def read_fits(run: Run) -> dict[str, Any]:
    """What the stage found, as JSON."""
    fits: dict[str, Any] = json.loads((run.stages.folder(LAWS) / FITS_FILE).read_text())
    return fits


def _curves(
    run: Run, asked: Sequence[Question], members: Mapping[str, Measured]
) -> dict[str, Curve]:
    """By "loss or error/weighting/domain", "all" being the mean over domains."""
    tests = _tests(asked)
    subsets_SM = subsets(len(members))
    answer_QTM = answer_odds(members)[tests]
    domain_Q = np.array([asked[i].domain for i in tests])
    weights = {kind: weights_of(run, kind, asked)[0][tests] for kind in WEIGHTINGS}
    sample = _sample(run, tests, answer_QTM)
    logs, targets_P, question_P = _distributions(run, [asked[tests[i]] for i in sample])
    curves: dict[str, Curve] = {}
    for weighting, weights_QM in weights.items():
        figures = {
            "loss": (subset_losses(answer_QTM, weights_QM, subsets_SM), domain_Q),
            "error": (
                subset_errors(logs, targets_P, question_P, weights_QM[sample], subsets_SM),
                domain_Q[sample],
            ),
        }
        for what, (values_QS, domains_Q) in figures.items():
            by_domain = {d: values_QS[domains_Q == d].mean(0) for d in run.domains}
            by_domain["all"] = np.mean(list(by_domain.values()), axis=0)
            for domain, values_S in by_domain.items():
                curves[f"{what}/{weighting}/{domain}"] = fit_curve(
                    values_S,
                    subsets_SM,
                    seed=run.recipe.seed,
                    num_resamples=run.recipe.laws.bootstrap_samples,
                )
    return curves


def _tests(asked: Sequence[Question]) -> list[int]:
    return [i for i, question in enumerate(asked) if question.is_test]


def _sample(run: Run, tests: Sequence[int], answer_QTM: Floats) -> NDArray[np.int64]:
    """As many test questions, evenly spread, as whole distributions fit into memory for."""
    tokens_Q = np.isfinite(answer_QTM[..., 0]).sum(1)
    vocabulary = int(run.base.config.vocab_size)
    most_tokens = max(_MOST_ELEMENTS // vocabulary, int(tokens_Q.max()))
    step = max(1, int(np.ceil(tokens_Q.sum() / most_tokens)))
    return np.arange(0, len(tests), step)


def _distributions(run: Run, asked: Sequence[Question]) -> tuple[list[Tensor], Tensor, Tensor]:
    """The members' log-probabilities of every token where the right answers are written."""
    conversations = [question.conversation for question in asked]
    targets = [np.array([*c.tokens[1:], 0]) for c in conversations]
    number = [np.full(len(c.tokens), i) for i, c in enumerate(conversations)]
    found = []
    for domain in run.domains:
        model = as_shipped(run.chunk(domain))
        scorer = Scorer(model, row_tokens=run.recipe.adapt.row_tokens)
        logs = scorer.map(conversations, lambda logits, _: (logits.log_softmax(-1).half(),))
        found.append(torch.from_numpy(answer_rows(conversations, [one for (one,) in logs])))
    return (
        found,
        torch.from_numpy(answer_rows(conversations, targets)),
        torch.from_numpy(answer_rows(conversations, number)),
    )


def _fit_pruning(run: Run) -> Fitted[PostPruningLaw] | None:
    points = read_pruning(run)
    try:
        return PostPruningLaw.fit(
            base_losses=[p["base_loss"] for p in points],
            kept_shares=[p["kept_share"] for p in points],
            base_billion_parameters=[p["base_parameters"] / 1e9 for p in points],
            billion_tokens=[p["tokens"] / 1e9 for p in points],
            losses=[p["loss"] for p in points],
            seed=run.recipe.seed,
            num_resamples=run.recipe.laws.bootstrap_samples,
        )
    except LawError as error:
        run.report(f"laws: P2 is not fitted: {error}")
        return None


def _mixture(run: Run) -> dict[str, Any] | None:
    # A recipe that took its share from an earlier run keeps that run's law.
    if not (run.stages.folder(MIXTURE) / MIXTURE_FILE).exists():
        return None
    found = read_mixture(run)
    for kind, side in (("domain", -1), ("general", 1)):
        law = MixtureLaw(**found[kind]["law"])
        mean = np.mean([p["domain_loss"] for p in found["points"]])
        measured, predicted = [], []
        for point in found["points"]:
            share = point["general_share"] if side > 0 else 1 - point["general_share"]
            scale = 1.0
            if kind == "domain":
                own = [p["domain_loss"] for p in found["points"] if p["domain"] == point["domain"]]
                scale = float(mean / np.mean(own))
            measured.append(scale * point[f"{kind}_loss"])
            predicted.append(law.predict(point["parameters"], point["tokens"], share))
        found[kind]["r2"] = explained(measured, predicted)
    return found


def proposition(
    curve: Curve,
    pruning: Fitted[PostPruningLaw] | None,
    *,
    base_parameters: int,
    base_loss: float,
) -> dict[str, Any]:
    """Proposition 4.1 with the pool's own constants, and whether the measured losses agree.

    a and b are the ensemble law's, γ and δ P2's; N0 counts billions, as in the paper.
    """
    num_members = curve.num_members[-1]
    fused = curve.losses[-1]
    found: dict[str, Any] = {
        "num_members": num_members,
        "base_loss": base_loss,
        "fused_loss": fused,
        "measured_fused_wins": fused <= base_loss,
        "predicted_fused_wins": None,
    }
    if curve.law is None or pruning is None:
        return found
    constants: dict[str, Any] = {
        "a": curve.law.law.a,
        "b": curve.law.law.b,
        "gamma": pruning.law.gamma,
        "delta": pruning.law.delta,
    }
    margin = ensemble_margin(num_members, base_parameters, **constants)
    predicted = bool(margin >= 0)
    return found | {
        "constants": constants,
        "margin": margin,
        "smallest_winning_ensemble": smallest_winning_ensemble(base_parameters, **constants),
        "predicted_fused_wins": predicted,
        "agrees": predicted == (fused <= base_loss),
    }


def _pool_laws(
    run: Run,
    curves: Mapping[str, Curve],
    pruning: Fitted[PostPruningLaw] | None,
    mixture: Mapping[str, Any] | None,
) -> PoolLaws:
    def ensemble(what: str) -> EnsembleLaw | None:
        law = curves[f"{what}/evidence/all"].law
        return law.law if law else None

    return PoolLaws(
        origin=(
            f"shoal downscale, pool {run.recipe.name}: all subsets of {len(run.domains)} chunks, "
            "fused with weights from evidence, on held-out test questions; short training runs"
        ),
        ensemble_error=ensemble("error"),
        ensemble_loss=ensemble("loss"),
        mixture_general=MixtureLaw(**mixture["general"]["law"]) if mixture else None,
        mixture_domain=MixtureLaw(**mixture["domain"]["law"]) if mixture else None,
        post_pruning=pruning.law if pruning else None,
    )


def _curve_json(curve: Curve) -> dict[str, Any]:
    return {
        "num_members": curve.num_members,
        "losses": curve.losses,
        "law": None if curve.law is None else asdict(curve.law.law),
        "intervals": None if curve.law is None else {
            name: [interval.low, interval.high] for name, interval in curve.law.intervals.items()
        },
        "r2": curve.r2,
    }  # fmt: skip
