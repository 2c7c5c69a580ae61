"""Outcomes from wherever a user points: a file of them, a published data set, another's log.

| format | recognised by | models |
|---|---|---|
| lm-evaluation-harness, `samples_TASK_DATE.jsonl` | `doc` and `resps` | one a file: its folder |
| OpenAI evals' log | `spec` with `completion_fns` | one a file |
| MixInstruct (LLM-Blender) | `candidates` | all; scores are win rates |
| RouterArena's cached results | `global_index` and `llm_selected` | one a file |
| RouterBench as CSV | `eval_name`, and `MODEL|total_cost` | all |
| RouteLLM's responses as CSV | `prompt` without `eval_name` | all |

Data stays where it is, with its licence beside it. RouteLLM's MMLU answers and LLMRouter's are
folders, known by a folder that only they have; any other folder stands for all logs that are in it,
those of one model each brought together. `exporters` writes the same formats.
RouterBench's own pickles are not read: a pickle is a program.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, TypeAlias

from policies.errors import OutcomesError
from policies.importers.benchmarks import (
    RIGHT_OR_WRONG,
    import_llmrouter,
    import_routellm_mmlu,
    read_mixinstruct,
    read_routellm,
    read_routerarena,
    read_routerbench,
)
from policies.importers.harnesses import read_evals, read_samples
from policies.importers.rows import Rows, reading
from policies.outcome_sets import merge
from policies.outcomes import Outcome, of_split, read_outcomes

Importer: TypeAlias = Callable[[Path, Rows], Iterable[Outcome]]

_LINES: Final[tuple[tuple[frozenset[str], Importer, str], ...]] = (
    (
        frozenset({"doc", "resps"}),
        read_samples,
        "lm-evaluation-harness's samples: doc, arguments, resps and a metric",
    ),
    (
        frozenset({"spec"}),
        read_evals,
        "a log of OpenAI's evals: events of sample_id, type and data, of which a match has correct",
    ),
    (
        frozenset({"candidates"}),
        read_mixinstruct,
        "MixInstruct: instruction, and candidates of model, text and scores",
    ),
    (
        frozenset({"global_index", "llm_selected"}),
        read_routerarena,
        "RouterArena's cached results: global_index, question, llm_selected and evaluation_result",
    ),
)
"""What reads JSON Lines whose first has these keys, and what each of them has to have."""

_TABLE: Final = "RouterBench: prompt, eval_name, and MODEL and MODEL|total_cost of every model"


def _reader_of(file: Path) -> Callable[[], list[Outcome]] | None:
    """Return what reads `file`, by its first line; None for outcomes of Shoal's own."""
    try:
        first = next(iter(Rows(file)), None)
    except (OSError, ValueError, csv.Error):
        first = None
    keys = set(first) if isinstance(first, dict) else set()
    if file.suffix.lower() == ".csv":
        if "prompt" in keys and "eval_name" not in keys:
            return lambda: _imported(file, read_routellm, f"RouteLLM: {RIGHT_OR_WRONG}")
        return lambda: _imported(file, read_routerbench, _TABLE)
    for wanted, read, layout in _LINES:
        if wanted <= keys:
            return lambda: _imported(file, read, layout)
    return None


def _imported(file: Path, read: Importer, layout: str) -> list[Outcome]:
    """Return what `read` makes of `file`, whose lines are to have a `layout`.

    Raises `OutcomesError`, naming the line, where one has not.
    """
    with reading(file, layout) as rows:
        outcomes = list(read(file, rows))
    if not outcomes:
        raise OutcomesError(f"{file}: the file holds no answer with a score; expected {layout}")
    return outcomes


PUBLISHED: Mapping[str, Callable[[Path], list[Outcome]]] = {
    "responses": import_routellm_mmlu,
    "dcrouter_preprocessed": import_llmrouter,
}
"""Importers by the folder that only their data set has."""


def load_outcomes(path: Path | str, *, split: str | None = None) -> list[Outcome]:
    """Read outcomes, another evaluation's log, or a published data set's folder.

    With `split`, only that part. Raises `OutcomesError` as `read_outcomes` does, and for a folder
    of neither.
    """
    path = Path(path)
    if not path.is_dir():
        read_log = _reader_of(path)
        if read_log is None:
            return read_outcomes(path, split=split)
        return of_split(path, read_log(), split)
    for folder, read_all in PUBLISHED.items():
        if (path / folder).is_dir():
            return of_split(path, read_all(path), split)
    files = sorted(file for kind in ("*.jsonl", "*_responses.csv") for file in path.rglob(kind))
    logs = [read for file in files if (read := _reader_of(file))]
    if logs:
        return of_split(path, merge(read() for read in logs), split)
    raise OutcomesError(
        f"{path} is a folder without {' or '.join(f'{name}/' for name in PUBLISHED)}, and without "
        "logs of lm-evaluation-harness, OpenAI's evals or RouterArena; give a file of outcomes "
        "(JSON Lines), RouteLLM's mmlu folder or LLMRouter's"
    )
