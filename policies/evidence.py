"""Fusion weights as evidence: how much, calibrated on held-out answers.

w_m ∝ prior_m^κ · exp(l_m / T), where l_m is the prompt's log-likelihood under member m. T → ∞ is
the router alone, κ = 0 with l_m per token is PackLLM's perplexity weighting (Mavromatis et al.
2024). T and κ are those under which held-out answers are likeliest; answers must not stem from
training data, where members are too sure of themselves.

Shapes: Q queries, M members, T tokens of an answer (padded).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from policies.errors import PolicyError

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class HeldOutAnswers:
    """What M members predict of Q right answers.

    `answer_QTM` are the log-probabilities of the answers' tokens, NaN beyond the end;
    `prompt_QM` the log-likelihoods of the prompts, in nats; `prior_QM` the router's scores, > 0.
    """

    answer_QTM: Floats
    prompt_QM: Floats
    prior_QM: Floats

    def __post_init__(self) -> None:
        num_queries, _, num_members = self.answer_QTM.shape
        if num_queries == 0:
            raise PolicyError("evidence needs at least one held-out answer to calibrate on")
        for name in ("prompt_QM", "prior_QM"):
            if getattr(self, name).shape != (num_queries, num_members):
                raise PolicyError(f"evidence: {name} does not fit the answers")
        if not (self.prior_QM > 0).all():
            raise PolicyError("evidence: priors must be > 0")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was found: `temperature` T, `prior_power` κ, and the mean NLL per answer, in nats."""

    temperature: float
    prior_power: float
    nll: float


def evidence_weights(
    prior_QM: Floats, prompt_QM: Floats, *, temperature: float, prior_power: float = 1.0
) -> Floats:
    """Return the weights, rows of which sum to one. An infinite temperature leaves the prior."""
    logs = prior_power * np.log(prior_QM) + prompt_QM / temperature
    raw = np.exp(logs - logs.max(axis=1, keepdims=True))
    weights: Floats = raw / raw.sum(axis=1, keepdims=True)
    return weights


def mixture_nll(
    weights_QM: Floats, answer_QTM: Floats, *, update_temperature: float | None = None
) -> Floats:
    """Return the negative log-likelihood of each answer under the fused model, [Q], in nats.

    With `update_temperature`, each token of the answer moves the weights before the next one.
    """
    log_weights_QM = np.log(np.maximum(weights_QM, 1e-300))
    total_Q = np.zeros(len(weights_QM))
    for token in range(answer_QTM.shape[1]):
        logp_QM = answer_QTM[:, token]
        there_Q = np.asarray(np.isfinite(logp_QM).all(axis=1))
        known_QM = np.where(there_Q[:, None], logp_QM, 0.0)
        joint_QM = log_weights_QM + known_QM
        highest_Q = joint_QM.max(axis=1)
        fused_Q = highest_Q + np.log(np.exp(joint_QM - highest_Q[:, None]).sum(axis=1))
        total_Q -= np.where(there_Q, fused_Q, 0.0)
        if update_temperature is not None:
            log_weights_QM = log_weights_QM + known_QM / update_temperature
            highest_Q1 = log_weights_QM.max(axis=1, keepdims=True)
            log_weights_QM -= highest_Q1 + np.log(
                np.exp(log_weights_QM - highest_Q1).sum(axis=1, keepdims=True)
            )
    return total_Q


def calibrate(answers: HeldOutAnswers) -> Calibration:
    """Return T and κ under which the held-out answers are likeliest (Nelder and Mead)."""

    def nll(parameters: Floats) -> float:
        weights_QM = evidence_weights(
            answers.prior_QM,
            answers.prompt_QM,
            temperature=float(np.exp(parameters[0])),
            prior_power=float(np.exp(parameters[1])),
        )
        return float(mixture_nll(weights_QM, answers.answer_QTM).mean())

    starts = [(np.log(temperature), 0.0) for temperature in (1.0, 10.0, 100.0)]
    found = [
        minimize(nll, start, method="Nelder-Mead", bounds=[(-3.0, 12.0), (-4.0, 3.0)])
        for start in starts
    ]
    best = min(found, key=lambda result: float(result.fun))
    temperature, power = np.exp(best.x)
    return Calibration(temperature=float(temperature), prior_power=float(power), nll=best.fun)
