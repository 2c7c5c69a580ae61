"""Outcomes from wherever a user points: a file of them, a published data set, another's log.

| format | recognised by | models |
|---|---|---|
| lm-evaluation-harness, `samples_TASK_DATE.jsonl` | `doc` and `resps` | one a file: its folder |
| OpenAI evals' log | `spec` with `completion_fns` | one a file |
| MixInstruct (LLM-Blender) | `candidates` | all; scores are win rates |
| RouterArena's cached results | `global_index` and `llm_selected` | one a file |
| RouterBench as CSV | `eval_name`, and `MODEL|total_cost` | all |

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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from policies.errors import OutcomesError
from policies.outcome_sets import merge
from policies.outcomes import Outcome, of_split, read_outcomes

Rows = Iterator[tuple[int, dict[str, Any]]]
# What lm-evaluation-harness's metrics are called, the best-informed first.
_METRICS: Final = ("exact_match", "acc_norm", "acc", "pass@1", "pass_at_1", "f1")
_SAMPLES = re.compile(r"samples_(.+?)(_\d{4}-.*)?\.jsonl")
_LABELS: Final = {"A is better": (1.0, 0.0), "B is better": (0.0, 1.0)}
_TIE: Final = (0.5, 0.5)


def import_samples(file: Path) -> list[Outcome]:
    """Read one `samples_*.jsonl` of lm-evaluation-harness; the task becomes the tag.

    The score is the first known metric of a line. Of a question with several choices, a line each,
    there is one outcome.
    """
    name = _SAMPLES.fullmatch(file.name)
    model = file.parent.name or "model"
    return [
        Outcome(
            id=str(row.get("doc_id", number)),
            query=_prompt(row["arguments"]),
            tags=(name[1],) if name else (),
            answer=str(row["target"]) if row.get("target") is not None else None,
            scores={model: _metric(row)},
            outputs=_said(model, row.get("filtered_resps") or row["resps"]),
        )
        for number, row in _json_rows(file)
    ]


def _prompt(arguments: Any) -> str:  # noqa: ANN401 - either of two layouts
    """Return the prompt of the first request: newer versions name the arguments."""
    first = next(iter(arguments.values())) if isinstance(arguments, dict) else arguments[0]
    return str(first["arg_0"] if isinstance(first, dict) else first[0])


def _metric(row: Mapping[str, Any]) -> float:
    for name in _METRICS:
        value = next((row[key] for key in row if key.split(",")[0] == name), None)
        if isinstance(value, int | float):
            return float(value)
    raise ValueError(f"no metric among {', '.join(_METRICS)}")


def _said(model: str, responses: Any) -> dict[str, str]:  # noqa: ANN401 - nested lists
    while isinstance(responses, list) and responses:
        responses = responses[0]
    return {model: responses} if isinstance(responses, str) else {}


def import_evals(file: Path) -> list[Outcome]:
    """Read a log of OpenAI evals: its `match` events, with the prompt of the `sampling` before."""
    model, task = "model", ""
    asked: dict[str, Mapping[str, Any]] = {}
    outcomes = []
    for _, row in _json_rows(file):
        if "spec" in row:
            model = str(row["spec"]["completion_fns"][0])
            task = str(row["spec"].get("base_eval") or row["spec"].get("eval_name") or "")
        elif row.get("type") == "sampling":
            asked[str(row["sample_id"])] = row["data"]
        elif row.get("type") == "match":
            sample = str(row["sample_id"])
            told, found = asked.get(sample, {}), row["data"]
            right = found.get("expected")
            right = right[0] if isinstance(right, list) and right else right
            outcomes.append(
                Outcome(
                    id=sample,
                    query=_asked(told.get("prompt", sample)),
                    tags=(task,) if task else (),
                    answer=None if right is None else str(right),
                    scores={model: float(found.get("score", found["correct"]))},
                    outputs=_said(model, told.get("sampled") or found.get("sampled")),
                )
            )
    return outcomes


def _asked(prompt: Any) -> str:  # noqa: ANN401 - a text or a conversation
    return str(prompt[-1]["content"]) if isinstance(prompt, list) else str(prompt)


def import_mixinstruct(file: Path) -> list[Outcome]:
    """Read MixInstruct: a model's score is the share of its comparisons that it won, ties half.

    Where candidates bring a `score` along, it is that; without `cmp_results`, the BERTScore.
    """
    outcomes = []
    for number, row in _json_rows(file):
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
                for name, share in zip(pair.split(","), _LABELS.get(label, _TIE), strict=True):
                    shares[name].append(share)
            scores = {name: sum(won) / len(won) for name, won in shares.items()}
        else:
            scores = {n: float(one["scores"]["bertscore"]) for n, one in candidates.items()}
        parts = [str(row[key]) for key in ("instruction", "input") if row.get(key)]
        outcomes.append(
            Outcome(
                id=str(row.get("id", number)),
                query="\n".join(parts),
                tags=tuple(str(row["id"]).split("/")[:1]) if "/" in str(row.get("id")) else (),
                answer=row.get("output"),
                scores=scores,
                outputs={name: str(one.get("text", "")) for name, one in candidates.items()},
            )
        )
    return outcomes


def import_routerbench(file: Path) -> list[Outcome]:
    """Read RouterBench as CSV: a column of scores per model, its response and its cost beside."""
    outcomes = []
    for _, row in _csv_rows(file):
        models = [key.partition("|")[0] for key in row if key.endswith("|total_cost")]
        known = [name for name in models if row.get(name)]
        outcomes.append(
            Outcome(
                id=row.get("sample_id", ""),
                query=row["prompt"],
                tags=(row["eval_name"],),
                scores={name: float(row[name]) for name in known},
                outputs={name: row.get(f"{name}|model_response", "") for name in known},
                costs={n: float(cost) for n in known if (cost := row[f"{n}|total_cost"])},
            )
        )
    return outcomes


def import_routerarena(file: Path) -> list[Outcome]:
    """Read one model's cached results of RouterArena; failed and unjudged answers are left out.

    The task is what stands before the number of `global_index`.
    """
    outcomes = []
    for _, row in _json_rows(file):
        judged = row.get("evaluation_result") or {}
        if row.get("success") is False or judged.get("score") is None:
            continue
        model, tokens = str(row["llm_selected"]), row.get("token_usage") or {}
        right, usd = judged.get("ground_truth"), judged.get("inference_cost")
        written = tokens.get("output_tokens")
        outcomes.append(
            Outcome(
                id=str(row["global_index"]),
                query=str(row["question"]),
                tags=(str(row["global_index"]).rpartition("_")[0],),
                answer=None if right is None else str(right),
                scores={model: min(max(float(judged["score"]), 0.0), 1.0)},
                outputs=_said(model, row.get("generated_answer")),
                prompt_tokens=tokens.get("input_tokens"),
                output_tokens={} if written is None else {model: int(written)},
                costs={} if usd is None else {model: float(usd)},
            )
        )
    return outcomes


def _importer_of(file: Path) -> Callable[[Path], list[Outcome]] | None:
    """Return what reads `file`, by its first line; None for outcomes of Shoal's own."""
    if file.suffix == ".csv":
        return _guarded(import_routerbench)
    try:
        with file.open(encoding="utf-8") as stream:
            first = json.loads(stream.readline() or "null")
    except (OSError, ValueError):
        return None
    keys = set(first) if isinstance(first, dict) else set()
    for wanted, read in (
        ({"doc", "resps"}, import_samples),
        ({"spec"}, import_evals),
        ({"candidates"}, import_mixinstruct),
        ({"global_index", "llm_selected"}, import_routerarena),
    ):
        if wanted <= keys:
            return _guarded(read)
    return None


def _guarded(read: Callable[[Path], list[Outcome]]) -> Callable[[Path], list[Outcome]]:
    """Return `read`, raising `OutcomesError` for what is not as the format says."""

    def guarded(file: Path) -> list[Outcome]:
        try:
            outcomes = read(file)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OSError) as error:
            raise OutcomesError(f"{file}: {type(error).__name__}: {error}") from None
        if not outcomes:
            raise OutcomesError(f"{file}: the file holds no answer with a score")
        return outcomes

    return guarded


def _json_rows(file: Path) -> Rows:
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, json.loads(line)


def _csv_rows(file: Path) -> Rows:
    with file.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        for row in reader:
            yield reader.line_num, row


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
    """Read outcomes, another evaluation's log, or a published data set's folder.

    With `split`, only that part. Raises `OutcomesError` as `read_outcomes` does, and for a folder
    of neither.
    """
    path = Path(path)
    if not path.is_dir():
        read_log = _importer_of(path)
        if read_log is None:
            return read_outcomes(path, split=split)
        return of_split(path, read_log(path), split)
    for folder, read_all in PUBLISHED.items():
        if (path / folder).is_dir():
            return of_split(path, read_all(path), split)
    logs = [(file, read) for file in sorted(path.rglob("*.jsonl")) if (read := _importer_of(file))]
    if logs:
        return of_split(path, merge(read(file) for file, read in logs), split)
    raise OutcomesError(
        f"{path} is a folder without {' or '.join(f'{name}/' for name in PUBLISHED)}, and without "
        "logs of lm-evaluation-harness, OpenAI's evals or RouterArena; give a file of outcomes "
        "(JSON Lines), RouteLLM's mmlu folder or LLMRouter's"
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
