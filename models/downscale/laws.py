"""The pool's own laws: fitted to what was measured, with bootstrap intervals, and checked.

Everything that a reader may doubt is kept: the points behind each fit, its R² and its intervals.
The ensemble law is fitted on all subsets of the chunks; D-CPT and P2 where the recipe makes their
short runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.downscale.adapt import NUM_JUDGED, trial
from models.downscale.adapters import has_adapters
from models.downscale.answers import answer_odds, measured, prompt_odds
from models.downscale.chunks import importance_of, load_model, loss_on
from models.downscale.corpora import GENERAL
from models.downscale.cut import cut
from models.downscale.data import Kind, mixture_losses
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
from models.downscale.examples import conversations
from models.downscale.members import base_of, member, mixture_of
from models.downscale.questions import Question, questions
from models.downscale.recipe import MemberShape
from models.downscale.shape import solve_shape
from models.downscale.stage import Run, read_json, stage, write_json
from models.downscale.vocabulary import base_model
from models.errors import BaseError
from models.tasks.base import Split
from models.training.forward import Scorer
from policies.errors import LawError
from policies.evidence import HeldOutAnswers, calibrate, evidence_weights
from policies.laws.downscaling import MixtureLaw, PostPruningLaw
from policies.laws.file import LAWS_FILE, PoolLaws, write_laws
from policies.laws.fitting import Fitted
from policies.laws.scaling import EnsembleLaw

_FITS, _PRUNING = "fits.json", "pruning.json"
WEIGHTINGS: Final = ("uniform", "evidence")
# Positions times vocabulary of the members' whole distributions that are held in memory at once.
_MOST_ELEMENTS: Final = 2**22


class PruningPoint(TypedDict):
    """The held-out loss, in nats per answer token, of one cut after so many training tokens."""

    kept_share: float
    base_parameters: int
    tokens: int
    base_loss: float
    loss: float


@stage("pruning")
def pruning(run: Run, folder: Path) -> None:
    """Stage: the base cut to several sizes for the first domain, each trained shortly, for P2."""
    domain, settings = run.domains[0], run.recipe.laws
    judged = conversations(run, domain, Split.ROUTER)[:NUM_JUDGED]
    base = base_model(run)[0]
    base_parameters, base_loss = base.num_parameters(), loss_on(run, judged, base)
    points: list[PruningPoint] = []
    for share in settings.pruning_shares:
        try:
            shape = solve_shape(base.config, round(share * base_parameters), MemberShape())
        except BaseError as error:
            run.report(f"pruning: no cut keeps {share:.1%}: {error}")
            continue
        chunk, report = cut(base, importance_of(run, domain), shape)
        found = trial(
            chunk,
            conversations(run, domain, Split.TRAIN),
            conversations(run, GENERAL, Split.TRAIN),
            {"loss": partial(loss_on, run, judged)},
            general_share=0.1,
            after_tokens=settings.pruning_tokens,
            settings=run.recipe.adapt,
            seed=run.recipe.seed,
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
        run.report(f"pruning: {share:.1%} kept: {points[-1]['loss']:.4f}")
    write_json(folder / _PRUNING, {"domain": domain, "points": points})


@stage("laws")
def laws(run: Run, folder: Path) -> None:
    """Stage: `laws.npz`, which serving reads, and the fits, which the report shows."""
    curves = _curves(run, questions(run))
    points: list[PruningPoint] = []
    if run.recipe.laws.pruning_shares and not has_adapters(run):
        points = read_json(pruning(run) / _PRUNING)["points"]
    fitted, mixture = _fit_pruning(run, points), _mixture(run)
    fits = {
        "curves": {key: _curve_json(curve) for key, curve in curves.items()},
        "pruning": fitted and {**asdict(fitted), "points": points},
        "mixture": mixture,
    }
    write_json(folder / _FITS, fits)
    seen = [
        {key: [curve.num_members, curve.losses] for key, curve in curves.items()},
        points,
        mixture and mixture["points"],
    ]
    data_sha256 = hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()
    found = _pool_laws(run, curves, fitted, mixture)
    write_laws(folder / LAWS_FILE, replace(found, data_sha256=data_sha256))


def fits_of(run: Run) -> dict[str, Any]:
    """What the stage found, as JSON: `curves`, `pruning` and `mixture`."""
    return read_json(laws(run) / _FITS)


def _curves(run: Run, asked: Sequence[Question]) -> dict[str, Curve]:
    """By "loss or error/weighting/domain", "all" being the mean over domains."""
    tests = [i for i, question in enumerate(asked) if question.is_test]
    members = [measured(run, domain) for domain in run.domains]
    subsets_SM = subsets(len(members))
    answer_QTM = answer_odds(members)[tests]
    domain_Q = np.array([asked[i].domain for i in tests])
    curves: dict[str, Curve] = {}
    sample = _sample(run, asked, tests, answer_QTM)
    if len(sample):
        logs, targets_P, question_P = _distributions(run, [asked[tests[i]] for i in sample])
    for weighting in WEIGHTINGS:
        weights_QM = _weights(run, asked, weighting)[tests]
        figures = {"loss": (subset_losses(answer_QTM, weights_QM, subsets_SM), domain_Q)}
        if len(sample):
            errors_QS = subset_errors(logs, targets_P, question_P, weights_QM[sample], subsets_SM)
            figures["error"] = (errors_QS, domain_Q[sample])
        for what, (values_QS, domains_Q) in figures.items():
            by_domain = {
                d: values_QS[domains_Q == d].mean(0) for d in run.domains if d in domains_Q
            }
            by_domain["all"] = np.mean(list(by_domain.values()), axis=0)
            for domain, values_S in by_domain.items():
                curves[f"{what}/{weighting}/{domain}"] = fit_curve(
                    values_S,
                    subsets_SM,
                    seed=run.recipe.seed,
                    num_resamples=run.recipe.laws.bootstrap_samples,
                )
    return curves


def _weights(run: Run, asked: Sequence[Question], weighting: str) -> Floats:
    """Fusion weights of each question over the chunks, [Q, M]: equal, or the evidence alone."""
    members = [measured(run, domain) for domain in run.domains]
    prompt_QM = prompt_odds(members)
    uniform_QM = np.full_like(prompt_QM, 1 / len(members))
    if weighting == "uniform":
        return uniform_QM
    rows = [i for i, question in enumerate(asked) if not question.is_test]
    found = calibrate(
        HeldOutAnswers(
            answer_QTM=answer_odds(members)[rows],
            prompt_QM=prompt_QM[rows],
            prior_QM=uniform_QM[rows],
        )
    )
    return evidence_weights(uniform_QM, prompt_QM, temperature=found.temperature)


def _sample(
    run: Run, asked: Sequence[Question], tests: Sequence[int], answer_QTM: Floats
) -> NDArray[np.int64]:
    """Of the test questions whose answers can be wrong, as many, evenly spread, as whole
    distributions fit into memory for."""
    rows_Q = np.array([at for at, i in enumerate(tests) if not asked[i].by_loss], np.int64)
    if not len(rows_Q):
        return rows_Q
    tokens_Q = np.isfinite(answer_QTM[rows_Q, :, 0]).sum(1)
    vocabulary = int(base_model(run)[0].config.vocab_size)
    most_tokens = max(_MOST_ELEMENTS // vocabulary, int(tokens_Q.max()))
    step = max(1, int(np.ceil(tokens_Q.sum() / most_tokens)))
    return rows_Q[::step]


def _distributions(run: Run, asked: Sequence[Question]) -> tuple[list[Tensor], Tensor, Tensor]:
    """The members' log-probabilities of every token where the right answers are written."""
    conversations = [question.conversation for question in asked]
    targets = [np.array([*c.tokens[1:], 0]) for c in conversations]
    number = [np.full(len(c.tokens), i) for i, c in enumerate(conversations)]
    found = []
    for domain in run.domains:
        model = load_model(member(run, domain), base=base_of(run, domain))
        scorer = Scorer(model, row_tokens=run.recipe.adapt.row_tokens)
        logs = scorer.map(conversations, lambda logits, _: (logits.log_softmax(-1).half(),))
        found.append(torch.from_numpy(answer_rows(conversations, [one for (one,) in logs])))
    return (
        found,
        torch.from_numpy(answer_rows(conversations, targets)),
        torch.from_numpy(answer_rows(conversations, number)),
    )


def _fit_pruning(run: Run, points: Sequence[PruningPoint]) -> Fitted[PostPruningLaw] | None:
    if not points:
        return None
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
    """The D-CPT laws with how much of their points' variance they explain."""
    found = mixture_of(run)
    if found is None:
        return None
    kinds: tuple[Kind, ...] = ("domain", "general")
    for kind in kinds:
        law = MixtureLaw(**found[kind]["law"])
        shares, losses = mixture_losses(found["points"], kind)
        predicted = [
            law.predict(point["parameters"], point["tokens"], share)
            for point, share in zip(found["points"], shares, strict=True)
        ]
        found[kind]["r2"] = explained(losses, predicted)
    return found


def _pool_laws(
    run: Run,
    curves: Mapping[str, Curve],
    pruning: Fitted[PostPruningLaw] | None,
    mixture: Mapping[str, Any] | None,
) -> PoolLaws:
    def ensemble(what: str) -> Fitted[EnsembleLaw] | None:
        curve = curves.get(f"{what}/evidence/all")
        return curve.law if curve else None

    error, loss = ensemble("error"), ensemble("loss")
    fits: dict[str, Fitted[Any] | None] = {
        "ensemble_error": error,
        "ensemble_loss": loss,
        "post_pruning": pruning,
    }
    return PoolLaws(
        origin=(
            f"shoal downscale, pool {run.recipe.name}: all subsets of {len(run.domains)} chunks, "
            "fused with weights from evidence, on held-out test questions or texts; short training "
            "runs"
        ),
        ensemble_error=error.law if error else None,
        ensemble_loss=loss.law if loss else None,
        mixture_general=MixtureLaw(**mixture["general"]["law"]) if mixture else None,
        mixture_domain=MixtureLaw(**mixture["domain"]["law"]) if mixture else None,
        post_pruning=pruning.law if pruning else None,
        rmse={
            **{name: fitted.rmse for name, fitted in fits.items() if fitted},
            **{
                f"mixture_{kind}": mixture[kind]["rmse"]
                for kind in ("general", "domain")
                if mixture
            },
        },
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
