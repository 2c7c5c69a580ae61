"""Planning questions before any training: how many chunks, of which size, at what carbon.

Answers from the laws alone. Each answer names the origin of the constants behind it, because some
are published, some are only the paper's illustration, and some must come from your own
measurements (`laws.npz`). It knows nothing of tables or plots.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from policies.carbon.llmcarbon import Device, TrainingCarbon, run_carbon, training_flops
from policies.errors import LawError
from policies.laws.downscaling import RecoveryLaw, RuntimeLaw, largest_domain_share
from policies.laws.file import PoolLaws
from policies.laws.scaling import (
    PAPER_LOOSE_A,
    PAPER_LOOSE_B,
    EnsembleLaw,
    InferenceEfficient,
    RankedShape,
    SharedExponent,
    ensemble_margin,
    rank_shapes,
    shapes_of_size,
    smallest_winning_ensemble,
)

# Budget units in lower case, with their size in the base unit of the same kind.
_UNITS: dict[str, tuple[str, float]] = {
    "tokens": ("tokens", 1.0),
    "flops": ("flops", 1.0),
    "kwh": ("kwh", 1.0),
    "mwh": ("kwh", 1e3),
    "gco2e": ("gco2e", 1.0),
    "kgco2e": ("gco2e", 1e3),
    "tco2e": ("gco2e", 1e6),
    "usd": ("usd", 1.0),
}
_AMOUNT: Final = r"\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)\s*([a-z0-9]+)\s*"
# Tokens per chunk of which the laws say anything at all, and then some.
_TOKENS: Final = (1e3, 1e18)


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where training runs: devices, their surroundings and, for budgets in USD, their price."""

    device: Device
    num_devices: int
    pue: float
    gco2e_per_kwh: float
    usd_per_device_hour: float | None = None


@dataclass(frozen=True, kw_only=True)
class EnsembleRow:
    """One way to spend the budget: `num_chunks` chunks of `chunk_parameters` each.

    Losses are in nats per token. `margin` is the left minus the right side of Proposition 4.1
    (>= 0: the ensemble beats its base); None for one chunk, which is the base.
    """

    num_chunks: int
    chunk_parameters: float
    chunk_loss: float
    ensemble_loss: float
    margin: float | None


@dataclass(frozen=True, kw_only=True)
class PlanningReport:
    """What `shoal plan` answers. `origins` says where each law's constants come from.

    `tokens_per_chunk` is the same for every number of chunks: n chunks of N0/n parameters on D
    tokens each cost as much as the base on D. `smallest_winning` counts N0 in billions as the paper
    does, `smallest_winning_counting_parameters` shows what that unit decides. `domain_share` is
    None where no mixture law was given.
    """

    base_parameters: float
    tokens_per_chunk: float
    carbon: TrainingCarbon
    rows: tuple[EnsembleRow, ...]
    smallest_winning: int | None
    smallest_winning_counting_parameters: int | None
    kept_share: float
    pruning_limit: float
    pruning_speedup: float
    domain_share: float | None
    shape_parameters: float
    shapes: tuple[RankedShape, ...]
    origins: dict[str, str]


def budget_flops(text: str, *, base_parameters: float, site: Site) -> float:
    """Return the training FLOPs that a budget such as "20e9 tokens" or "2 tCO2e" pays for.

    Units: tokens (per chunk), flops, kWh, MWh, gCO2e, kgCO2e, tCO2e (operational plus embodied),
    USD (needs the site's price). Case does not matter. Raises `LawError`.
    """
    match = re.fullmatch(_AMOUNT, text.lower())
    unit, scale = _UNITS.get(match[2], ("", 0.0)) if match else ("", 0.0)
    if match is None or not unit:
        raise LawError(
            f"budget: {text!r} is not an amount and a unit; allowed units are tokens, flops, kWh, "
            "MWh, gCO2e, kgCO2e, tCO2e, USD (for example 20e9tokens, 500kWh, 2tCO2e)"
        )
    amount = float(match[1]) * scale
    if amount <= 0:
        raise LawError(f"budget: {text!r} must be above zero")
    if unit == "tokens":
        return training_flops(base_parameters, amount)
    if unit == "flops":
        return amount
    # All that a run costs is linear in its FLOPs.
    once = _carbon(1.0, site)
    if unit == "gco2e":
        return amount / ((once.operational_tco2e + once.embodied_tco2e) * 1e6)
    if unit == "kwh":
        return amount / (once.mwh * 1e3)
    if site.usd_per_device_hour:
        return amount / (once.device_hours * site.usd_per_device_hour)
    raise LawError(f"budget: {text!r} needs the price of a device hour in USD")


def _carbon(flops: float, site: Site) -> TrainingCarbon:
    return run_carbon(
        flops,
        site.device,
        num_devices=site.num_devices,
        pue=site.pue,
        gco2e_per_kwh=site.gco2e_per_kwh,
    )


def plan_training(
    *,
    base_parameters: float,
    flops: float,
    site: Site,
    sizes: Sequence[int],
    kept_share: float,
    laws: PoolLaws | None = None,
    general_loss_limit: float | None = None,
) -> PlanningReport:
    """Answer the planning questions for a base of `base_parameters` and a budget of `flops`.

    `kept_share` is the share of the base's performance that pruning must not fall below. With
    `laws`, the pool's fitted constants replace published ones; the domain share is answered only
    with its mixture law and a `general_loss_limit`. Raises `LawError` where `flops` pay for too few
    or too many tokens.
    """
    fitted = laws.origin if laws else ""
    tokens = flops / training_flops(base_parameters, 1)
    if not _TOKENS[0] <= tokens <= _TOKENS[1]:
        least, most = _TOKENS
        raise LawError(
            f"budget: it pays for {tokens:.3g} tokens per chunk; allowed are {least:g} to {most:g}"
        )
    ensemble = (laws and laws.ensemble_loss) or EnsembleLaw(
        L0=0.0, a=PAPER_LOOSE_A, b=PAPER_LOOSE_B
    )
    illustration = "the paper's loose a = b = 0.83 (Sengupta et al. 2025, section 4): illustration"
    rows = []
    for n in sizes:
        chunk_loss = SharedExponent.PUBLISHED.predict(base_parameters / n, tokens)
        rows.append(
            EnsembleRow(
                num_chunks=n,
                chunk_parameters=base_parameters / n,
                chunk_loss=chunk_loss,
                ensemble_loss=chunk_loss - ensemble.gain(n),
                margin=ensemble_margin(n, base_parameters, a=ensemble.a, b=ensemble.b)
                if n > 1
                else None,
            )
        )
    domain_share = None
    if laws and laws.mixture_general and general_loss_limit is not None:
        domain_share = largest_domain_share(
            laws.mixture_general,
            parameters=base_parameters,
            tokens=tokens,
            general_loss_limit=general_loss_limit,
        )
    winning = smallest_winning_ensemble(base_parameters, a=ensemble.a, b=ensemble.b)
    shape_parameters = base_parameters / (winning or 1)
    pruning_limit = RecoveryLaw.PUBLISHED.critical_ratio(kept_share)
    return PlanningReport(
        base_parameters=base_parameters,
        tokens_per_chunk=tokens,
        carbon=_carbon(flops, site),
        rows=tuple(rows),
        smallest_winning=winning,
        smallest_winning_counting_parameters=smallest_winning_ensemble(
            base_parameters, a=ensemble.a, b=ensemble.b, parameter_unit=1.0
        ),
        kept_share=kept_share,
        pruning_limit=pruning_limit,
        pruning_speedup=RuntimeLaw.PUBLISHED.speedup(pruning_limit),
        domain_share=domain_share,
        shape_parameters=shape_parameters,
        shapes=rank_shapes(
            shapes_of_size(shape_parameters),
            parameters=shape_parameters,
            tokens=tokens,
            law=InferenceEfficient.PUBLISHED,
        ),
        origins={
            "chunk loss": "Chinchilla fit of Bian et al. 2025 (models of 80M to 339M parameters)",
            "ensemble loss": fitted if laws and laws.ensemble_loss else illustration,
            "ensemble beats base": "Sengupta et al. 2025, eq. 13, N0 in billions, γ = 1.08, "
            "δ = 0.29 as quoted for Llama-3-8B; a and b as for the ensemble loss",
            "carbon": f"LLMCarbon (Faiz et al. 2024); {site.device.name}: {site.device.source}",
            "pruning limit": "Sengupta et al. 2025, Compression Laws, β = -1.03 and κ = -0.67",
            "domain share": fitted
            if domain_share is not None
            else "no constants are published: fit the D-CPT law and give it by --laws",
            "shape": "Bian et al. 2025, eq. 4; latency relative by depth",
        },
    )
