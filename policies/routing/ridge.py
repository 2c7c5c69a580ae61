"""Weighted ridge regression of many targets on one sparse matrix, all solved in step.

Shape legend: Q queries, F features, C columns (targets), U features that occur.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TOLERANCE = 1e-3
"""A column is solved when its residual is this small, relative to where it began."""


def ridge_regression(
    X_QF: sp.csr_matrix, Y_QC: Floats, weights_QC: Floats, *, ridge: float, max_iterations: int = 40
) -> NDArray[np.float32]:
    """Return W [F, C] that minimises, column by column, Σ_q weight·(x_q·w - y_q)² + ridge·|w|².

    Conjugate gradients on the normal equations (Hestenes & Stiefel 1952); one pass over the matrix
    serves every column. Where a weight is 0 its target says nothing (and must not be NaN).
    """
    used = np.unique(X_QF.indices)
    X = X_QF[:, used].astype(np.float32).tocsr()
    X_T = X.T.tocsr()
    weights = weights_QC.astype(np.float32)
    W_UC = np.zeros((len(used), Y_QC.shape[1]), np.float32)
    residual = X_T @ (weights * Y_QC.astype(np.float32))
    direction = residual.copy()
    size_C = _squares(residual)
    enough_C = size_C * TOLERANCE**2
    for _ in range(max_iterations):
        open_C = size_C > enough_C
        if not open_C.any():
            break
        image = X_T @ (weights * (X @ direction)) + np.float32(ridge) * direction
        curvature_C = np.einsum("uc,uc->c", direction, image, dtype=np.float64)
        step_C = np.where(open_C, size_C / np.maximum(curvature_C, 1e-30), 0).astype(np.float32)
        W_UC += step_C * direction
        residual -= step_C * image
        new_C = _squares(residual)
        direction *= (new_C / np.maximum(size_C, 1e-30)).astype(np.float32)
        direction += residual
        size_C = np.where(open_C, new_C, size_C)
    W_FC = np.zeros((X_QF.shape[1], W_UC.shape[1]), np.float32)
    W_FC[used] = W_UC
    return W_FC


def _squares(columns: NDArray[np.float32]) -> Floats:
    squares_C: Floats = np.einsum("uc,uc->c", columns, columns, dtype=np.float64)
    return squares_C
