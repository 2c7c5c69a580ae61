"""A fusion of a pool's models token by token, its weights calibrated on right answers.

w_m ∝ prior_m^κ · exp(l_m / T), l_m being the prompt's log-likelihood and the prior what a router
expects (see `policies.evidence`). T and κ are those under which the references of questions are
likeliest, the prior coming from a router that was learned without them.

Shape legend: Q questions, M members, T tokens of an answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from models.engines.registry import engine_traits
from models.pool import Pool
from policies.errors import PolicyError
from policies.evidence import HeldOutAnswers, calibrate
from policies.outcomes import Outcome
from policies.routing.router import Router
from router.learning.likelihood import Likelihoods

# Two numbers are fitted; more answers would change neither and take their time.
_MOST_ANSWERS: Final = 100
_LEAST_ANSWERS: Final = 20


def fusible(pool: Pool, names: Sequence[str]) -> tuple[str, ...]:
    """Return the most of the models `names` that one engine can fuse; empty where it is not two.

    They share an engine, and conversations become the same tokens in all of them; and each has a
    folder of weights, by which its fusion can be calibrated.
    """
    fuses = {e.name: engine_traits(e, pool.loaded_by(e.name)).fuses for e in pool.engines}
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        engine, card = pool.engine_of(name), pool.model(name).card
        if fuses[engine.name] and card is not None and card.path.is_dir():
            groups[engine.name, card.prompt_sha256].append(name)
    most = max(groups.values(), key=len, default=[])
    return tuple(most) if len(most) > 1 else ()


def learn_fusion(
    pool: Pool,
    members: Sequence[str],
    train: Sequence[Outcome],
    fit: Callable[[Sequence[Outcome]], Router],
    *,
    router: dict[str, Any],
) -> dict[str, Any]:
    """Return the specification of a fusion of `members`, which takes its prior from `router`.

    Half of `train` teaches `fit` a router, the references of the other half calibrate. Raises
    `PolicyError` where these are too few.
    """
    taught, rest = train[::2], train[1::2]
    rows = [row for row in rest if row.answer][:_MOST_ANSWERS]
    if len(rows) < _LEAST_ANSWERS:
        raise PolicyError(
            f"{len(rows)} questions with a reference are too few to calibrate on; it takes "
            f"{_LEAST_ANSWERS} in half of the training questions"
        )
    prior = fit(taught)
    columns = [prior.models.index(name) for name in members]
    likelihoods = Likelihoods(pool)
    told = [[likelihoods.of(name, row.query, row.answer or "") for name in members] for row in rows]
    longest = max(len(one.answer_T) for row in told for one in row)
    answer_QTM = np.full((len(rows), longest, len(members)), np.nan)
    for q, row in enumerate(told):
        for m, one in enumerate(row):
            answer_QTM[q, : len(one.answer_T), m] = one.answer_T
    found = calibrate(
        HeldOutAnswers(
            answer_QTM=answer_QTM,
            prompt_QM=np.array([[one.prompt for one in row] for row in told]),
            prior_QM=np.maximum(prior.qualities([row.query for row in rows])[:, columns], 1e-6),
        )
    )
    return {
        "kind": "fused",
        "answer": {
            "members": list(members),
            "weights": "evidence",
            "temperature": round(found.temperature, 4),
        },
        "prior_power": round(found.prior_power, 4),
        "router": router,
    }
