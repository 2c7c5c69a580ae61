"""How much general data a chunk's training gets: the D-CPT law, fitted on short runs.

Que et al. 2024, "D-CPT Law": the losses on the domain and on general data, as functions of the
tokens and of the mixture, are fitted on small runs and then tell the mixture of the full run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final, TypedDict

import numpy as np
from transformers import PreTrainedModel

from models.downscale.adapt import mean_loss
from models.downscale.architecture import num_parameters
from models.downscale.errors import DownscaleError
from models.downscale.run import GENERAL, Run
from models.downscale.stage import write_json
from models.downscale.trials import NUM_JUDGED, trial
from models.tasks import Split
from policies.errors import LawError
from policies.laws import Fitted, MixtureLaw

MIXTURE: Final = "mixture"
MIXTURE_FILE: Final = "mixture.json"
_CANDIDATES: Final = np.linspace(0.0, 0.9, 181)


class Point(TypedDict):
    """One judgement of one run."""

    domain: str
    general_share: float
    parameters: int
    tokens: int
    domain_loss: float
    general_loss: float


def fit_mixture(run: Run, *, upstream: Sequence[str]) -> None:
    """Stage "mixture": the short runs, both laws and the share to take; nothing if it is given."""
    if run.recipe.adapt.general_share != "auto":
        return
    settings = run.recipe.laws

    def action(folder: Path) -> None:
        points: list[Point] = []
        for domain in run.domains[: settings.mixture_domains]:
            for share in settings.mixture_shares:
                points += _points(run, domain, share, folder)
        try:
            domain_law, general_law = fit_laws(
                points, seed=run.recipe.seed, num_resamples=settings.bootstrap_samples
            )
        except LawError as error:
            raise DownscaleError(
                f"laws: the mixture law cannot be fitted: {error}; give more mixture_shares or "
                "mixture_tokens, or a number as adapt.general_share"
            ) from None
        share = best_share(
            domain_law.law,
            general_law.law,
            parameters=points[0]["parameters"],
            tokens=run.recipe.adapt.tokens,
            general_weight=settings.general_weight,
        )
        facts = {
            "general_share": share,
            "points": points,
            "domain": asdict(domain_law),
            "general": asdict(general_law),
        }
        write_json(folder / MIXTURE_FILE, facts)
        run.report(f"mixture: {share:.1%} general data")

    facts = {
        "laws": {key: getattr(settings, key) for key in type(settings).model_fields
                 if key.startswith(("mixture", "general", "bootstrap"))},
        "adapt": run.recipe.adapt.model_dump(),
        "seed": run.recipe.seed,
    }  # fmt: skip
    run.stages.run(MIXTURE, action, settings=facts, upstream=upstream)


def general_share(run: Run) -> float:
    """The share of general data of every chunk: the recipe's, or what the stage found."""
    given = run.recipe.adapt.general_share
    return float(read_mixture(run)["general_share"]) if given == "auto" else given


def read_mixture(run: Run) -> dict[str, Any]:
    """What the stage wrote."""
    content: dict[str, Any] = json.loads((run.stages.folder(MIXTURE) / MIXTURE_FILE).read_text())
    return content


def fit_laws(
    points: Sequence[Point], *, seed: int, num_resamples: int
) -> tuple[Fitted[MixtureLaw], Fitted[MixtureLaw]]:
    """The law of the domains' own losses and that of the general loss.

    Each takes the share of the corpus on which its loss is measured. Losses of several domains are
    pooled after division by their domain's mean, times the mean of all.

    Raises:
        LawError: too few points.
    """
    mean = float(np.mean([point["domain_loss"] for point in points]))
    means = {
        domain: np.mean([p["domain_loss"] for p in points if p["domain"] == domain])
        for domain in {point["domain"] for point in points}
    }
    fit = partial(
        MixtureLaw.fit,
        parameters=[point["parameters"] for point in points],
        tokens=[point["tokens"] for point in points],
        seed=seed,
        num_resamples=num_resamples,
    )
    domain = fit(
        shares=[1 - point["general_share"] for point in points],
        losses=[p["domain_loss"] * mean / float(means[p["domain"]]) for p in points],
    )
    general = fit(
        shares=[point["general_share"] for point in points],
        losses=[point["general_loss"] for point in points],
    )
    return domain, general


def best_share(
    domain: MixtureLaw,
    general: MixtureLaw,
    *,
    parameters: float,
    tokens: float,
    general_weight: float,
) -> float:
    """The general share with the least domain loss + `general_weight` · general loss.

    Raises:
        LawError: the laws predict no finite loss.
    """
    with np.errstate(all="ignore"):
        cost = np.array(
            [
                domain.predict(parameters, tokens, float(1 - share))
                + general_weight * general.predict(parameters, tokens, float(share))
                for share in _CANDIDATES
            ]
        )
    if not np.isfinite(cost).any():
        raise LawError("the mixture laws predict no finite loss; more short runs are needed")
    return float(_CANDIDATES[int(np.nanargmin(cost))])


def _points(run: Run, domain: str, share: float, folder: Path) -> list[Point]:
    """One short run's judgements; kept, so that an interrupted stage need not repeat them."""
    file = folder / f"{domain}-{share:g}.json"
    if file.exists():
        kept: list[Point] = json.loads(file.read_text())["points"]
        return kept
    row_tokens = run.recipe.adapt.row_tokens

    def judge(model: PreTrainedModel, name: str) -> float:
        examples = run.conversations(name, Split.ROUTER)[:NUM_JUDGED]
        return mean_loss(model, examples, row_tokens=row_tokens)

    member = run.chunk(domain, stage="cut")
    found = trial(
        member,
        run.lessons[domain],
        run.lessons[GENERAL],
        {name: partial(judge, name=name) for name in (domain, GENERAL)},
        general_share=share,
        after_tokens=run.recipe.laws.mixture_tokens,
        settings=run.recipe.adapt,
        seed=run.recipe.seed,
    )
    points = [
        Point(
            domain=domain,
            general_share=share,
            parameters=num_parameters(member),
            tokens=judgement.tokens,
            domain_loss=judgement.losses[domain],
            general_loss=judgement.losses[GENERAL],
        )
        for judgement in found
    ]
    write_json(file, {"points": points})
    last = points[-1]
    run.report(
        f"mixture/{domain}: {share:.0%} general: {last['domain_loss']:.4f} own, "
        f"{last['general_loss']:.4f} general after {last['tokens']:,} tokens"
    )
    return points
