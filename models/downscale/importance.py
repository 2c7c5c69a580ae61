"""How much each part of a model matters, from whichever way of scoring.

Shapes: `L` layers, `H` heads, `F` feed-forward channels, `D` hidden channels, `N` = 2L + 1 norms
(each layer's two, in order, and the last).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from policies.files import replacing

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Scores, larger means more important; compare only within one array's last axis.

    `norm_energy_ND` is the mean square of each hidden channel where it enters each norm, by which
    a cut keeps the norms' scale; ones where it isn't known.
    """

    layers_L: Array
    heads_LH: Array
    feed_forward_LF: Array
    hidden_D: Array
    norm_energy_ND: Array


def save_importance(importance: Importance, file: Path) -> None:
    """Write an .npz, atomically."""
    arrays = {field.name: getattr(importance, field.name) for field in fields(importance)}
    with replacing(file) as fresh:
        np.savez(fresh, **arrays)


def load_importance(file: Path) -> Importance:
    """Read what `save_importance` wrote."""
    with np.load(file, allow_pickle=False) as arrays:
        return Importance(**{name: arrays[name] for name in arrays.files})
