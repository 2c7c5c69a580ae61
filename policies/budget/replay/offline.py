"""The offline optimum: the linear program that sees the whole day."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.optimize import linprog

from policies.errors import LawError


def offline_optimum(
    qualities_NM: NDArray[np.float64],
    costs_NM: NDArray[np.float64],
    available_NM: NDArray[np.bool_],
    *,
    budget: float,
) -> NDArray[np.float64]:
    """Return [N, M] shares x that maximise Σ x·quality subject to Σ x·cost <= `budget`.

    Each request is answered once by a model that is up; shares may be fractional (at most one
    request is split, as there is one budget). HiGHS, sparse. Raises `LawError` where not even the
    cheapest models keep the budget.
    """
    num_requests, num_models = qualities_NM.shape
    rows = np.repeat(np.arange(num_requests), num_models)
    once = sp.csr_matrix(
        (np.ones(rows.size), (rows, np.arange(rows.size))), shape=(num_requests, rows.size)
    )
    # SciPy's stubs know no sparse constraints.
    solve: Any = linprog
    solution = solve(
        c=-qualities_NM.ravel(),
        # In units of the budget, so that the solver's tolerances mean something.
        A_ub=sp.csr_matrix(costs_NM.ravel()[None, :] / budget),
        b_ub=[1.0],
        A_eq=once,
        b_eq=np.ones(num_requests),
        bounds=np.stack([np.zeros(rows.size), available_NM.ravel().astype(np.float64)], axis=1),
        method="highs",
    )
    if solution.status != 0:
        raise LawError(f"no assignment keeps the budget {budget:g}: {solution.message}")
    return np.asarray(solution.x, dtype=np.float64).reshape(num_requests, num_models)
