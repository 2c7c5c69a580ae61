"""Logs of evaluation harnesses, one of each model: lm-evaluation-harness, and OpenAI's evals."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from policies.errors import OutcomesError
from policies.importers.rows import Rows, said_by
from policies.json_text import read_json_text
from policies.outcomes import Outcome

# What lm-evaluation-harness's metrics are called, the best-informed first.
_METRICS: Final = ("exact_match", "acc_norm", "acc", "pass@1", "pass_at_1", "f1")
_SAMPLES = re.compile(r"samples_(.+?)(_\d{4}-.*)?\.jsonl")


def read_samples(file: Path, rows: Rows) -> Iterator[Outcome]:
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
            outputs=said_by(model, row.get("filtered_resps") or row["resps"]),
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
            return _asked(read_json_text(prompt))
    return str(prompt)


def _metric(row: Mapping[str, Any]) -> float:
    for name in (*_METRICS, *(row.get("metrics") or ())):  # newer versions list what a task has
        value = next((row[key] for key in row if key.split(",")[0] == name), None)
        if isinstance(value, int | float):
            return float(value)
    raise OutcomesError(f"it has no metric; known are {', '.join(_METRICS)}")


def read_evals(_: Path, rows: Rows) -> Iterator[Outcome]:
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
                outputs=said_by(model, told.get("sampled") or found.get("sampled")),
            )


def _asked(prompt: Any) -> str:  # noqa: ANN401 - a text or a conversation
    said = prompt[-1]["content"] if isinstance(prompt, list) else prompt
    parts = said if isinstance(said, list) else [said]
    return "\n".join(str(part["text"] if isinstance(part, dict) else part) for part in parts)
