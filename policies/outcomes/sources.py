"""Outcomes from wherever a user points: a file of them, or the folder of a published data set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from policies.errors import OutcomesError
from policies.outcomes.base import Outcome, of_split, read_outcomes
from policies.outcomes.importers import import_llmrouter, import_routellm_mmlu

PUBLISHED: Mapping[str, Callable[[Path], list[Outcome]]] = {
    "responses": import_routellm_mmlu,
    "dcrouter_preprocessed": import_llmrouter,
}
"""Importers by the folder that only their data set has."""


def load_outcomes(path: Path | str, *, split: str | None = None) -> list[Outcome]:
    """Read a JSON Lines file, RouteLLM's `mmlu` folder, or LLMRouter's.

    With `split`, only that part. Raises `OutcomesError` as `read_outcomes` does, and for a folder
    that is neither.
    """
    path = Path(path)
    if not path.is_dir():
        return read_outcomes(path, split=split)
    for folder, read in PUBLISHED.items():
        if (path / folder).is_dir():
            return of_split(path, read(path), split)
    raise OutcomesError(
        f"{path} is a folder without {' or '.join(f'{name}/' for name in PUBLISHED)}; give a file "
        "of outcomes (JSON Lines), RouteLLM's mmlu folder or LLMRouter's"
    )
