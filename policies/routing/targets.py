"""Reward-distillation targets (ZOOTER, Lu et al. 2023, sections 3.2 and 3.3).

Shape legend: Q queries, M models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def enhance(scores_QM: Floats, tags: Sequence[Sequence[str]], *, beta: float) -> Floats:
    """Return label-enhanced scores: β·s(q) + (1 - β)·mean over q's tags of the tag's mean score.

    A noisy score (one sampled answer, right or wrong) is pulled towards what its kind of query
    usually gets. Unknown scores (NaN) stay unknown; a query without tags keeps its own scores.
    """
    known = ~np.isnan(scores_QM)
    values = np.where(known, scores_QM, 0.0)
    names = {tag: i for i, tag in enumerate(dict.fromkeys(t for row in tags for t in row))}
    belongs = np.zeros((len(scores_QM), len(names)))
    for q, row in enumerate(tags):
        for tag in row:
            belongs[q, names[tag]] = 1.0
    count_TM = belongs.T @ known
    mean_TM = np.divide(
        belongs.T @ values, count_TM, out=np.full(count_TM.shape, np.nan), where=count_TM > 0
    )
    num_tags_Q1 = belongs.sum(1, keepdims=True)
    prior_QM = belongs @ np.nan_to_num(mean_TM) / np.maximum(num_tags_Q1, 1)
    # A known score of q is itself in each of its tags' means, so those means are all known.
    enhanced = np.where(num_tags_Q1 > 0, beta * values + (1 - beta) * prior_QM, values)
    return np.where(known, enhanced, np.nan)


def distribution(scores_QM: Floats, *, temperature: float) -> Floats:
    """Return softmax(scores / temperature) over each row's known scores; 0 where unknown."""
    scaled = np.where(np.isnan(scores_QM), -np.inf, scores_QM / temperature)
    exponential = np.exp(scaled - scaled.max(1, keepdims=True))
    share: Floats = exponential / exponential.sum(1, keepdims=True)
    return share
