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
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeAlias

from pydantic import ValidationError

from policies.errors import OutcomesError
from policies.kinds import explain
from policies.outcome_sets import merge
from policies.outcomes import Outcome, of_split, read_outcomes

_MORE: Final = "cells beyond the head's"
csv.field_size_limit(2**31 - 1)  # whole documents stand in cells


class Rows:
    """The rows of a file of JSON Lines, or of a CSV; `number` is the line of the last one."""

    def __init__(self, file: Path) -> None:
        self.number = 0
        self._file = file

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._file.suffix.lower() == ".csv":
            with self._file.open(encoding="utf-8-sig", newline="") as table:
                self.number = 1
                reader = csv.DictReader(table, restkey=_MORE)
                for row in reader:
                    self.number = reader.line_num
                    yield row
            return
        with self._file.open("rb") as lines:
            for self.number, line in enumerate(lines, start=1):
                if line.strip():
                    yield json.loads(line)


Importer: TypeAlias = Callable[[Path, Rows], Iterable[Outcome]]

# What lm-evaluation-harness's metrics are called, the best-informed first.
_METRICS: Final = ("exact_match", "acc_norm", "acc", "pass@1", "pass_at_1", "f1")
_SAMPLES = re.compile(r"samples_(.+?)(_\d{4}-.*)?\.jsonl")
# What spreadsheets and data frames write where nothing is known, and for right and wrong.
_MISSING: Final = ("", "nan", "null", "none", "n/a")
_RIGHT: Final = {"true": 1.0, "false": 0.0}
_TIE: Final = (0.5, 0.5)
_LABELS: Final = {
    "A is better": (1.0, 0.0),
    "B is better": (0.0, 1.0),
    "Same good": _TIE,
    "Same bad": _TIE,
}


def _samples(file: Path, rows: Rows) -> Iterator[Outcome]:
    """Read one `samples_*.jsonl` of lm-evaluation-harness; the task becomes the tag.

    The score is the first known metric of a line. Where answers were read by several filters, a
    line each, it is the first filter's.
    """
    name = _SAMPLES.fullmatch(file.name)
    model = file.parent.name or "model"
    first: Any = None
    for number, row in enumerate(rows):
        first = row.get("filter") if number == 0 else first
        if row.get("filter") != first:
            continue
        yield Outcome(
            id=str(row.get("doc_id", rows.number)),
            query=_prompt(row["arguments"]),
            tags=(name[1],) if name else (),
            answer=str(row["target"]) if row.get("target") is not None else None,
            scores={model: _metric(row)},
            outputs=_said(model, row.get("filtered_resps") or row["resps"]),
        )


def _prompt(arguments: Any) -> str:  # noqa: ANN401 - either of two layouts
    """Return the prompt of the first request: newer versions name the arguments.

    A conversation stands there as JSON text, perhaps in a list.
    """
    first = next(iter(arguments.values())) if isinstance(arguments, dict) else arguments[0]
    told = first["arg_0"] if isinstance(first, dict) else first[0]
    [prompt] = told if isinstance(told, list) else [told]
    if str(prompt).startswith('[{"role":'):
        with suppress(ValueError):
            return _asked(json.loads(prompt))
    return str(prompt)


def _metric(row: Mapping[str, Any]) -> float:
    for name in (*_METRICS, *(row.get("metrics") or ())):  # newer versions list what a task has
        value = next((row[key] for key in row if key.split(",")[0] == name), None)
        if isinstance(value, int | float):
            return float(value)
    raise OutcomesError(f"it has no metric; known are {', '.join(_METRICS)}")


def _said(model: str, responses: Any) -> dict[str, str]:  # noqa: ANN401 - nested lists
    while isinstance(responses, list) and responses:
        responses = responses[0]
    return {model: responses} if isinstance(responses, str) else {}


def _evals(_: Path, rows: Rows) -> Iterator[Outcome]:
    """Read a log of OpenAI evals: its `match` events, with the prompt of the `sampling` before.

    Where a model was the judge, that is the first `sampling`, and the score is in `metrics`.
    """
    model, task = "model", ""
    asked: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if "spec" in row:
            model = str(row["spec"]["completion_fns"][0])
            task = str(row["spec"].get("base_eval") or row["spec"].get("eval_name") or "")
        elif row.get("type") == "sampling":
            asked.setdefault(str(row["sample_id"]), row["data"])
        elif row.get("type") == "match" or (
            row.get("type") == "metrics" and "score" in row["data"]
        ):
            sample = str(row["sample_id"])
            told, found = asked.get(sample, {}), row["data"]
            right = found.get("expected")
            right = right[0] if isinstance(right, list) and right else right
            score = found["score"] if "score" in found else found["correct"]
            yield Outcome(
                id=sample,
                query=_asked(told.get("prompt", sample)),
                tags=(task,) if task else (),
                answer=None if right is None else str(right),
                scores={model: float(score)},
                outputs=_said(model, told.get("sampled") or found.get("sampled")),
            )


def _asked(prompt: Any) -> str:  # noqa: ANN401 - a text or a conversation
    said = prompt[-1]["content"] if isinstance(prompt, list) else prompt
    parts = said if isinstance(said, list) else [said]
    return "\n".join(str(part["text"] if isinstance(part, dict) else part) for part in parts)


def _mixinstruct(_: Path, rows: Rows) -> Iterator[Outcome]:
    """Read MixInstruct: a model's score is the share of its comparisons that it won, ties half.

    Where candidates bring a `score` along, it is that; without `cmp_results`, the BERTScore.
    """
    for row in rows:
        candidates = {str(one["model"]): one for one in row["candidates"]}
        own = {
            n: one["scores"]["score"] for n, one in candidates.items() if "score" in one["scores"]
        }
        judged = row.get("cmp_results")
        results = json.loads(judged) if isinstance(judged, str) else judged
        if own:
            scores = {name: float(score) for name, score in own.items()}
        elif results:
            shares: dict[str, list[float]] = defaultdict(list)
            for pair, label in results.items():
                if label not in _LABELS:
                    raise OutcomesError(f"{pair}: {label!r} is none of {', '.join(_LABELS)}")
                for name, share in zip(pair.split(","), _LABELS[label], strict=True):
                    shares[name].append(share)
            scores = {name: sum(won) / len(won) for name, won in shares.items()}
        else:
            scores = {n: float(one["scores"]["bertscore"]) for n, one in candidates.items()}
        parts = [str(row[key]) for key in ("instruction", "input") if row.get(key)]
        yield Outcome(
            id=str(row.get("id", rows.number)),
            query="\n".join(parts),
            tags=tuple(str(row["id"]).split("/")[:1]) if "/" in str(row.get("id")) else (),
            answer=row.get("output"),
            scores=scores,
            outputs={name: str(one.get("text", "")) for name, one in candidates.items()},
        )


def _routerbench(_: Path, rows: Rows) -> Iterator[Outcome]:
    """Read RouterBench as CSV: a column of scores per model, its response and its cost beside.

    A query that no model has a score of is left out.
    """
    for row in rows:
        if _MORE in row or None in row.values():
            raise OutcomesError("it has not as many cells as the head has columns")
        models = [key.removesuffix(_COST) for key in row if key.endswith(_COST)]
        scores = {name: _RIGHT.get(cell.lower(), cell) for name, cell in _told(row, models).items()}
        if models and not scores:
            continue
        yield Outcome(
            id=row.get("sample_id", ""),
            query=row["prompt"],
            tags=(row["eval_name"],),
            scores={name: float(score) for name, score in scores.items()},
            outputs={name: row.get(f"{name}|model_response", "") for name in scores},
            costs={
                key.removesuffix(_COST): float(cost)
                for key, cost in _told(row, [name + _COST for name in scores]).items()
            },
        )


def _told(row: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Return the cells of `names` that say something."""
    return {name: row[name].strip() for name in names if row[name].strip().lower() not in _MISSING}


def _routellm(file: Path, rows: Rows) -> Iterator[Outcome]:
    """Read RouteLLM's `gsm8k_responses.csv`, or one subject of its MMLU answers.

    Leaves out what the `contaminated_prompts.jsonl` beside it, or above, names.
    """
    lists = (folder / _CONTAMINATED for folder in (file.parent, file.parent.parent))
    listed = next(filter(Path.is_file, lists), None)
    yield from _right_or_wrong(file, rows, _contaminated(listed) if listed else frozenset())


def _contaminated(file: Path) -> frozenset[str]:
    with _rows(file, "eval_prompt") as rows:
        return frozenset(str(row["eval_prompt"]) for row in rows)


def _right_or_wrong(file: Path, rows: Rows, contaminated: frozenset[str]) -> Iterator[Outcome]:
    """Read a column of True and False per model, perhaps with its responses in another.

    An empty cell is a missing score. The file's name is the tag.
    """
    subject = file.stem.removeprefix("mmlu_").removesuffix(_SAID + "s")
    for row in rows:
        if _MORE in row or None in row.values():
            raise OutcomesError("it has not as many cells as the head has columns")
        prompt = row.pop("prompt")
        said_of = {name: name.removesuffix(_SAID) for name in row if name.endswith(_SAID)}
        models = [name for name in row if said_of.get(name) not in row]
        told = _told(row, models)
        if not {cell.lower() for cell in told.values()} <= _RIGHT.keys():
            raise OutcomesError(f"it has {told}")
        if prompt not in contaminated and told:
            said = {name: row[name + _SAID] for name in told if row.get(name + _SAID)}
            scores = {name: _RIGHT[cell.lower()] for name, cell in told.items()}
            yield Outcome(query=prompt, scores=scores, tags=(subject,), outputs=said)


def _routerarena(_: Path, rows: Rows) -> Iterator[Outcome]:
    """Read one model's cached results of RouterArena; failed and unjudged answers are left out.

    The task is what stands before the number of `global_index`.
    """
    for row in rows:
        judged = row.get("evaluation_result") or {}
        if row.get("success") is False or judged.get("score") is None:
            continue
        model, tokens = str(row["llm_selected"]), row.get("token_usage") or {}
        right, usd = judged.get("ground_truth"), judged.get("inference_cost")
        written = tokens.get("output_tokens")
        yield Outcome(
            id=str(row["global_index"]),
            query=str(row["question"]),
            tags=(str(row["global_index"]).rpartition("_")[0],),
            answer=None if right is None else str(right),
            scores={model: float(judged["score"])},
            outputs=_said(model, row.get("generated_answer")),
            prompt_tokens=tokens.get("input_tokens"),
            output_tokens={} if written is None else {model: int(written)},
            costs={} if usd is None else {model: float(usd)},
        )


_LINES: Final[tuple[tuple[frozenset[str], Importer, str], ...]] = (
    (
        frozenset({"doc", "resps"}),
        _samples,
        "lm-evaluation-harness's samples: doc, arguments, resps and a metric",
    ),
    (
        frozenset({"spec"}),
        _evals,
        "a log of OpenAI's evals: events of sample_id, type and data, of which a match has correct",
    ),
    (
        frozenset({"candidates"}),
        _mixinstruct,
        "MixInstruct: instruction, and candidates of model, text and scores",
    ),
    (
        frozenset({"global_index", "llm_selected"}),
        _routerarena,
        "RouterArena's cached results: global_index, question, llm_selected and evaluation_result",
    ),
)
"""What reads JSON Lines whose first has these keys, and what each of them has to have."""

_TABLE: Final = "RouterBench: prompt, eval_name, and MODEL and MODEL|total_cost of every model"
_RIGHT_OR_WRONG: Final = "prompt, and True or False per model"
_SAID: Final = "_response"
_COST: Final = "|total_cost"
_CONTAMINATED: Final = "contaminated_prompts.jsonl"


def _reader_of(file: Path) -> Callable[[], list[Outcome]] | None:
    """Return what reads `file`, by its first line; None for outcomes of Shoal's own."""
    try:
        first = next(iter(Rows(file)), None)
    except (OSError, ValueError, csv.Error):
        first = None
    keys = set(first) if isinstance(first, dict) else set()
    if file.suffix.lower() == ".csv":
        if "prompt" in keys and "eval_name" not in keys:
            return lambda: _imported(file, _routellm, f"RouteLLM: {_RIGHT_OR_WRONG}")
        return lambda: _imported(file, _routerbench, _TABLE)
    for wanted, read, layout in _LINES:
        if wanted <= keys:
            return lambda: _imported(file, read, layout)
    return None


def _imported(file: Path, read: Importer, layout: str) -> list[Outcome]:
    """Return what `read` makes of `file`, whose lines are to have a `layout`.

    Raises `OutcomesError`, naming the line, where one has not.
    """
    with _rows(file, layout) as rows:
        outcomes = list(read(file, rows))
    if not outcomes:
        raise OutcomesError(f"{file}: the file holds no answer with a score; expected {layout}")
    return outcomes


@contextmanager
def _rows(file: Path, layout: str) -> Iterator[Rows]:
    """Give the rows of `file`; what goes wrong with one becomes an error that names its line."""
    rows = Rows(file)
    try:
        yield rows
    except OSError as error:
        raise OutcomesError(f"{file} cannot be read: {error.strerror}") from None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, csv.Error) as error:
        raise OutcomesError(
            f"{file}, line {rows.number}: {_why(error)}; expected {layout}"
        ) from None


def _why(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"the key {error.args[0]!r} is missing"
    if isinstance(error, ValidationError):
        return explain(error)
    if isinstance(error, json.JSONDecodeError):
        return f"it is not JSON: {error}"
    return str(error) if isinstance(error, OutcomesError) else f"{type(error).__name__}: {error}"


_TASKS: Final = "example_data/query_data/default_query_{}.jsonl"


def import_routellm_mmlu(folder: Path) -> list[Outcome]:
    """Read RouteLLM's MMLU answers (Ong et al. 2024): `responses/*.csv`, one file per subject.

    Leaves out the prompts of `contaminated_prompts.jsonl`. The subject becomes the tag. Raises
    `OutcomesError` naming file and line.
    """
    contaminated = _contaminated(folder / _CONTAMINATED)
    files = sorted((folder / "responses").glob("*.csv"))
    if not files:
        raise OutcomesError(f"{folder / 'responses'} holds no CSV file")
    outcomes: list[Outcome] = []
    for file in files:
        with _rows(file, _RIGHT_OR_WRONG) as rows:
            outcomes += _right_or_wrong(file, rows, contaminated)
    return outcomes


def import_llmrouter(folder: Path) -> list[Outcome]:
    """Read LLMRouter's answers of nine models: `dcrouter_preprocessed/{train,test}.json`.

    The task becomes the tag (from `example_data/query_data`), the part `split`. Test questions
    that also stand in train get the split "test-in-train", so that nobody judges a router on what
    it has seen. A score that is null is missing. Raises `OutcomesError` naming file and entry.
    """
    outcomes = []
    seen: set[str] = set()
    tasks: dict[str, str] = {}
    for split in ("train", "test"):
        with _rows(folder / _TASKS.format(split), "query and task_name") as rows:
            tasks |= {str(row["query"]): str(row["task_name"]) for row in rows}
    for split in ("train", "test"):
        file = folder / "dcrouter_preprocessed" / f"{split}.json"
        with _rows(file, "a list of question and scores"):
            entries = json.loads(file.read_bytes())
            if not isinstance(entries, list):
                raise OutcomesError("it does not hold a list")
        for number, row in enumerate(entries, start=1):
            try:
                query, scores = str(row["question"]), dict(row["scores"])
                leaked = split == "test" and query.strip() in seen
                told = {n: float(scores[n]) for n in sorted(scores) if scores[n] is not None}
                if scores and not told:
                    continue
                outcomes.append(
                    Outcome(
                        query=query,
                        scores=told,
                        tags=(tasks[query],) if query in tasks else (),
                        split="test-in-train" if leaked else split,
                    )
                )
            except (KeyError, TypeError, ValueError) as error:
                raise OutcomesError(
                    f"{file}, entry {number}: {_why(error)}; expected question, and scores by model"
                ) from None
        seen = {outcome.query.strip() for outcome in outcomes}
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
