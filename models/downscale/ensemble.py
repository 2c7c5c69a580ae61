"""What every subset of the members would do, fused: arithmetic on what each member says alone.

A mixture's probability of a token is the weighted mean of its members', so once each member's
probabilities of the right answers are stored, the loss of all subsets needs no model any more.

Shapes: `Q` questions, `T` answer tokens (padded with NaN), `M` members, `S` subsets, `P` answer
tokens of all questions in a row, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from policies.errors import LawError
from policies.laws.fitting import Fitted
from policies.laws.scaling import EnsembleLaw

Floats = NDArray[np.float64]

_AT_ONCE: Final = 64


def subsets(num_members: int, *, most: int = 12) -> NDArray[np.bool_]:
    """All subsets but the empty one, [S, M]; with more than `most` members only the nested ones."""
    members = range(num_members)
    if num_members <= most:
        chosen = [c for n in range(1, num_members + 1) for c in combinations(members, n)]
    else:
        turned = [[*members[i:], *members[:i]] for i in members]
        chosen = [tuple(order[:n]) for order in turned for n in range(1, num_members + 1)]
    mask = np.zeros((len(chosen), num_members), bool)
    for row, one in zip(mask, chosen, strict=True):
        row[list(one)] = True
    return mask


def subset_losses(answer_QTM: Floats, weights_QM: Floats, subsets_SM: NDArray[np.bool_]) -> Floats:
    """Nats per answer token of each question under each fused subset, [Q, S].

    `weights_QM` are those of the whole ensemble; a subset's are renormalised.
    """
    # A few questions at a time: of long answers and many subsets there is much.
    parts = [
        _subset_losses(answer_QTM[i : i + _AT_ONCE], weights_QM[i : i + _AT_ONCE], subsets_SM)
        for i in range(0, len(answer_QTM), _AT_ONCE)
    ]
    return np.concatenate(parts)


def _subset_losses(answer_QTM: Floats, weights_QM: Floats, subsets_SM: NDArray[np.bool_]) -> Floats:
    known_QT: NDArray[np.bool_] = np.asarray(np.isfinite(answer_QTM).all(-1))
    # exp(-60) is far below any probability that a mean loss could notice.
    p_QTM = np.exp(np.clip(np.where(known_QT[..., None], answer_QTM, 0.0), -60.0, 0.0))
    kept_MS = subsets_SM.T.astype(np.float64)
    total_QS = np.maximum(weights_QM @ kept_MS, 1e-300)
    joint_QTS = (p_QTM * weights_QM[:, None, :]) @ kept_MS / total_QS[:, None, :]
    logs_QTS = np.where(known_QT[..., None], np.log(np.maximum(joint_QTS, 1e-300)), 0.0)
    losses: Floats = -logs_QTS.sum(1) / known_QT.sum(1)[:, None]
    return losses


def subset_errors(
    logs_MPV: Sequence[Tensor],
    targets_P: Tensor,
    question_P: Tensor,
    weights_QM: Floats,
    subsets_SM: NDArray[np.bool_],
) -> Floats:
    """Whether each fused subset's greedy answer is wrong, [Q, S], as 0 or 1.

    Greedy decoding writes the right answer exactly if the right token is the likeliest after
    every right beginning, so no generation is needed. `question_P` says which question a token
    belongs to.
    """
    p_MPV = [logs.float().exp() for logs in logs_MPV]
    weights_PM = torch.from_numpy(weights_QM).float()[question_P]
    num_questions = len(weights_QM)
    wrong = np.zeros((num_questions, len(subsets_SM)))
    for s, subset in enumerate(subsets_SM):
        members = np.flatnonzero(subset)
        joint_PV = sum(weights_PM[:, m, None] * p_MPV[m] for m in members)
        assert isinstance(joint_PV, Tensor)
        missed_P = (joint_PV.argmax(-1) != targets_P).float()
        missed_Q = torch.zeros(num_questions).index_add_(0, question_P, missed_P)
        wrong[:, s] = (missed_Q > 0).numpy()
    return wrong


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A loss against the number of members, averaged over the subsets of each size, and its law.

    `law` is None where none fits; `r2` is the share of the curve's variance that it explains.
    """

    num_members: tuple[int, ...]
    losses: tuple[float, ...]
    law: Fitted[EnsembleLaw] | None
    r2: float | None


def fit_curve(
    losses_S: Floats, subsets_SM: NDArray[np.bool_], *, seed: int, num_resamples: int
) -> Curve:
    """Average `losses_S` over the subsets of each size and fit the ensemble law."""
    sizes_S = subsets_SM.sum(1)
    sizes = sorted({int(n) for n in sizes_S})
    means = [float(losses_S[sizes_S == n].mean()) for n in sizes]
    law: Fitted[EnsembleLaw] | None = None
    r2: float | None = None
    try:
        law = EnsembleLaw.fit(
            num_members=sizes, losses=means, seed=seed, num_resamples=num_resamples
        )
    except LawError:  # fewer sizes than constants
        pass
    else:
        r2 = explained(means, [law.law.predict(float(n)) for n in sizes])
    return Curve(num_members=tuple(sizes), losses=tuple(means), law=law, r2=r2)


def explained(measured: Sequence[float], predicted: Sequence[float]) -> float | None:
    """R², the share of the measured values' variance that is predicted; None if they are equal."""
    values = np.asarray(measured)
    spread = float(((values - values.mean()) ** 2).sum())
    if spread == 0:
        return None
    return 1 - float(((values - np.asarray(predicted)) ** 2).sum()) / spread


def answer_rows(conversations: Sequence[Any], values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Of per-token `values` of each conversation, those that predict an answer's token, [P, …]."""
    return np.concatenate(
        [
            found[:-1][np.asarray(conversation.is_answer[1:], bool)]
            for conversation, found in zip(conversations, values, strict=True)
        ]
    )
