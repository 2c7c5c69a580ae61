"""What is trained on and what is tested on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np
from sklearn.model_selection import GroupKFold, KFold

from policies.errors import OutcomesError
from policies.outcomes import Outcome

Protocol: TypeAlias = Literal["folds", "tasks", "split"]

NUM_FOLDS = 5


def folds(
    outcomes: Sequence[Outcome],
    protocol: Protocol,
    *,
    train: str = "train",
    test: str = "test",
    seed: int = 0,
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield pairs of training and test rows.

    "folds" are five random parts, each tested once; "tasks" keeps every task (first tag) whole, so
    that a tested task was never trained on; "split" trains on the outcomes' split `train` and
    tests on `test`. Raises `OutcomesError` where the outcomes lack the tags or splits.
    """
    rows = np.arange(len(outcomes))
    if protocol == "split":
        parts = [
            [row for row, outcome in enumerate(outcomes) if outcome.split == split]
            for split in (train, test)
        ]
        if not all(parts):
            raise OutcomesError(f"these outcomes lack the split {train!r} or {test!r}")
        yield parts[0], parts[1]
    elif protocol == "folds":
        for some, rest in KFold(NUM_FOLDS, shuffle=True, random_state=seed).split(rows):
            yield some.tolist(), rest.tolist()
    else:
        tasks = [outcome.tags[0] if outcome.tags else "" for outcome in outcomes]
        num_tasks = len(set(tasks))
        if num_tasks < 2 or "" in tasks:
            raise OutcomesError("leaving tasks out needs a tag on every outcome, and two tasks")
        for some, rest in GroupKFold(min(NUM_FOLDS, num_tasks)).split(rows, groups=tasks):
            yield some.tolist(), rest.tolist()
