"""Outcomes in the formats of other people's routers and evaluations; `importers` reads them back.

| format | written | keeps beside query, scores and first tag |
|---|---|---|
| `routellm` | `responses/mmlu_TASK.csv`; right or wrong only | |
| `llmrouter` | `dcrouter_preprocessed/{train,test}.json` and the tasks | the split |
| `routerbench` | one CSV | answers, costs |
| `routerarena` | `MODEL.jsonl` | answers, costs, tokens, reference |
| `mixinstruct` | one JSON Lines file; who won each pair | answers, reference |
| `evals` | `MODEL/TASK.jsonl`, logs of OpenAI's evals | answers, reference |
| `lm-eval` | `MODEL/samples_TASK.jsonl` of lm-evaluation-harness | answers, reference |

A model's "/" becomes "__" in the name of a file or folder, as lm-evaluation-harness has it.
"""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from policies.errors import OutcomesError
from policies.files import write_atomic
from policies.outcome_sets import TEST, TRAIN
from policies.outcomes import Outcome, score_table

_NO_TASK = "task"


def export_outcomes(outcomes: Sequence[Outcome], out: Path, *, format: str) -> int:
    """Write `outcomes` to `out`, a file or a folder as `format` has it; return how many.

    Raises `OutcomesError` for an unknown format, and for scores that it cannot hold.
    """
    if format not in FORMATS:
        raise OutcomesError(f"format: {format!r} is unknown; allowed are {', '.join(FORMATS)}")
    return FORMATS[format](outcomes, out)


def _routellm(outcomes: Sequence[Outcome], out: Path) -> int:
    """A column per model, so that only queries which all of them answered can be told."""
    models = score_table(outcomes).models
    tables: dict[str, list[dict[str, str]]] = defaultdict(list)
    for row in outcomes:
        if not all(name in row.scores for name in models):
            continue
        for name in models:
            if row.scores[name] not in (0, 1):
                raise OutcomesError(
                    f"routellm: {name} scores {row.scores[name]} on {row.query[:40]!r}; the format "
                    "knows right (1) and wrong (0)"
                )
        told = {name: str(bool(row.scores[name])) for name in models}
        tables[_task(row)].append({"prompt": row.query, **told})
    folder = _folder(out / "responses")
    for task, rows in tables.items():
        write_atomic(folder / f"mmlu_{_as_name(task)}.csv", _csv(["prompt", *models], rows))
    write_atomic(out / "contaminated_prompts.jsonl", "")
    return sum(map(len, tables.values()))


def _llmrouter(outcomes: Sequence[Outcome], out: Path) -> int:
    parts, tasks = _folder(out / "dcrouter_preprocessed"), _folder(out / "example_data/query_data")
    for split in (TRAIN, TEST):
        rows = [row for row in outcomes if (row.split == TEST) == (split == TEST)]
        told = [{"question": row.query, "scores": dict(row.scores)} for row in rows]
        write_atomic(parts / f"{split}.json", json.dumps(told, ensure_ascii=False, indent=1))
        named = ({"task_name": row.tags[0], "query": row.query} for row in rows if row.tags)
        write_atomic(tasks / f"default_query_{split}.jsonl", _lines(named))
    return len(outcomes)


def _routerbench(outcomes: Sequence[Outcome], out: Path) -> int:
    models = score_table(outcomes).models
    parts = ("{}", "{}|model_response", "{}|total_cost")
    columns = [part.format(name) for name in models for part in parts]
    rows = []
    for number, row in enumerate(outcomes):
        found: dict[str, Any] = {
            "sample_id": row.id or f"{_task(row)}.{number}",
            "prompt": row.query,
            "eval_name": _task(row),
        }
        for name, score in row.scores.items():
            told = score, row.outputs.get(name, ""), row.costs.get(name, "")
            found |= {part.format(name): value for part, value in zip(parts, told, strict=True)}
        rows.append(found)
    write_atomic(out, _csv(["sample_id", "prompt", "eval_name", *columns], rows))
    return len(rows)


def _routerarena(outcomes: Sequence[Outcome], out: Path) -> int:
    def told(number: int, row: Outcome, name: str) -> Iterable[dict[str, Any]]:
        tokens = {"input_tokens": row.prompt_tokens, "output_tokens": row.output_tokens.get(name)}
        judged = {
            "ground_truth": row.answer,
            "score": row.scores[name],
            "inference_cost": row.costs.get(name),
        }
        yield {
            "global_index": f"{_task(row)}_{number}",
            "question": row.query,
            "llm_selected": name,
            "generated_answer": row.outputs.get(name),
            "token_usage": tokens,
            "success": True,
            "evaluation_result": judged,
        }

    return _file_each(outcomes, out, "{model}.jsonl", told)


def _mixinstruct(outcomes: Sequence[Outcome], out: Path) -> int:
    rows = []
    for number, row in enumerate(outcomes):
        pairs = combinations(row.scores, 2)
        won = {f"{a},{b}": _label(row.scores[a] - row.scores[b]) for a, b in pairs}
        candidates = [
            {"model": name, "text": row.outputs.get(name, ""), "scores": {"score": score}}
            for name, score in row.scores.items()
        ]
        rows.append(
            {
                "id": f"{_as_name(_task(row))}/{number}",
                "instruction": row.query,
                "input": "",
                "output": row.answer,
                "candidates": candidates,
                "cmp_results": json.dumps(won),
            }
        )
    write_atomic(out, _lines(rows))
    return len(rows)


def _label(difference: float) -> str:
    if difference == 0:
        return "Same good"
    return "A is better" if difference > 0 else "B is better"


def _evals(outcomes: Sequence[Outcome], out: Path) -> int:
    def told(number: int, row: Outcome, name: str) -> Iterable[dict[str, Any]]:
        sample, said, score = f"{_task(row)}.{number}", row.outputs.get(name), row.scores[name]
        prompt = [{"role": "user", "content": row.query}]
        found: dict[str, Any] = {"correct": score >= 0.5, "expected": row.answer, "sampled": said}
        if score not in (0, 1):
            found["score"] = score
        yield {
            "sample_id": sample,
            "type": "sampling",
            "data": {"prompt": prompt, "sampled": [said]},
        }
        yield {"sample_id": sample, "type": "match", "data": found}

    def spec(name: str, task: str) -> Iterable[dict[str, Any]]:
        yield {"spec": {"completion_fns": [name], "eval_name": task}}

    return _file_each(outcomes, out, "{model}/{task}.jsonl", told, head=spec)


def _lm_eval(outcomes: Sequence[Outcome], out: Path) -> int:
    def told(number: int, row: Outcome, name: str) -> Iterable[dict[str, Any]]:
        said = row.outputs.get(name, "")
        yield {
            "doc_id": number,
            "doc": {"query": row.query},
            "target": row.answer,
            "arguments": {"gen_args_0": {"arg_0": row.query, "arg_1": {}}},
            "resps": [[said]],
            "filtered_resps": [said],
            "exact_match": row.scores[name],
        }

    return _file_each(outcomes, out, "{model}/samples_{task}.jsonl", told)


FORMATS: Mapping[str, Callable[[Sequence[Outcome], Path], int]] = {
    "evals": _evals,
    "llmrouter": _llmrouter,
    "lm-eval": _lm_eval,
    "mixinstruct": _mixinstruct,
    "routellm": _routellm,
    "routerarena": _routerarena,
    "routerbench": _routerbench,
}
"""What writes each format."""


def _file_each(
    outcomes: Sequence[Outcome],
    out: Path,
    name: str,
    told: Callable[[int, Outcome, str], Iterable[dict[str, Any]]],
    *,
    head: Callable[[str, str], Iterable[dict[str, Any]]] = lambda _, __: (),
) -> int:
    """Write what is `told` of each model's answers to files by `name`; `head` begins each."""
    files: dict[Path, list[dict[str, Any]]] = {}
    for number, row in enumerate(outcomes):
        for model in row.scores:
            file = out / name.format(model=_as_name(model), task=_as_name(_task(row)))
            files.setdefault(file, list(head(model, _task(row)))).extend(told(number, row, model))
    for file, rows in files.items():
        _folder(file.parent)
        write_atomic(file, _lines(rows))
    return len(outcomes)


def _task(outcome: Outcome) -> str:
    return outcome.tags[0] if outcome.tags else _NO_TASK


def _as_name(text: str) -> str:
    """Return `text` as part of a file's name."""
    return text.replace("/", "__")


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()
