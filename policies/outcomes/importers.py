"""Outcomes from wherever a user points: a file of them, or the folder of a published data set.

Of the latter it knows the two layouts; the data stays where it is, with its licence beside it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from policies.errors import OutcomesError
from policies.outcomes.base import Outcome, of_split, read_outcomes

_TRUTH = {"True": 1.0, "False": 0.0}


def import_routellm_mmlu(folder: Path) -> list[Outcome]:
    """Read RouteLLM's MMLU answers (Ong et al. 2024): `responses/*.csv`, one file per subject.

    Leaves out the prompts of `contaminated_prompts.jsonl`. The subject becomes the tag. Raises
    `OutcomesError` naming file and line.
    """
    contaminated = {
        str(row["eval_prompt"]) for row in _json_lines(folder / "contaminated_prompts.jsonl")
    }
    files = sorted((folder / "responses").glob("*.csv"))
    if not files:
        raise OutcomesError(f"{folder / 'responses'} holds no CSV file")
    outcomes = []
    for file in files:
        subject = file.stem.removeprefix("mmlu_")
        with file.open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            for row in reader:
                prompt = row.pop("prompt", None)
                if prompt is None or set(row.values()) - set(_TRUTH):
                    raise OutcomesError(
                        f"{file}, line {reader.line_num}: expected a prompt and True or False "
                        f"per model, got {row}"
                    )
                if prompt in contaminated:
                    continue
                scores = {name: _TRUTH[value] for name, value in row.items()}
                outcomes.append(Outcome(query=prompt, scores=scores, tags=(subject,)))
    return outcomes


def import_llmrouter(folder: Path) -> list[Outcome]:
    """Read LLMRouter's answers of nine models: `dcrouter_preprocessed/{train,test}.json`.

    The task becomes the tag (from `example_data/query_data`), the part `split`. Test questions
    that also stand in train get the split "test-in-train", so that nobody judges a router on what
    it has seen. Raises `OutcomesError` naming file and entry.
    """
    outcomes = []
    seen: set[str] = set()
    tasks = {
        str(row["query"]): str(row["task_name"])
        for split in ("train", "test")
        for row in _json_lines(folder / f"example_data/query_data/default_query_{split}.jsonl")
    }
    for split in ("train", "test"):
        file = folder / "dcrouter_preprocessed" / f"{split}.json"
        rows = _json(file)
        if not isinstance(rows, list):
            raise OutcomesError(f"{file} does not hold a list")
        for number, row in enumerate(rows, start=1):
            try:
                query, scores = str(row["question"]), dict(row["scores"])
                leaked = split == "test" and query.strip() in seen
                outcomes.append(
                    Outcome(
                        query=query,
                        scores={name: float(scores[name]) for name in sorted(scores)},
                        tags=(tasks[query],) if query in tasks else (),
                        split="test-in-train" if leaked else split,
                    )
                )
            except (KeyError, TypeError, ValueError) as error:
                raise OutcomesError(f"{file}, entry {number}: {error!r}") from None
        seen = {outcome.query.strip() for outcome in outcomes}
    return outcomes


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


def _json(file: Path) -> Any:  # noqa: ANN401 - the callers check the shape
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutcomesError(f"{file} cannot be read: {error}") from None


def _json_lines(file: Path) -> list[Any]:
    try:
        text = file.read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise OutcomesError(f"{file} cannot be read: {error}") from None
