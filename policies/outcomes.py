"""What every model answered to real queries: the format that routers and cascades learn from.

JSON Lines of one query and how well each model answered it. Only `query` and `scores` are required.
A query may have scores for some models only: a ledger knows the one model that answered, a
benchmark knows all. Of published data sets two layouts are known; the data stays where it is, with
its licence beside it.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from policies.errors import OutcomesError
from policies.files import replacing

Score: TypeAlias = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count: TypeAlias = Annotated[int, Field(ge=0)]
Amount: TypeAlias = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_STRICT = ConfigDict(extra="forbid")


@validated(frozen=True, kw_only=True, config=_STRICT)
class AnswerLogprobs:
    """Natural log-probabilities of one answer's tokens: their mean, least, and number.

    `entropy` is the mean entropy, in nats, of the distributions that the tokens were drawn from;
    None where nobody kept it.
    """

    mean: float
    min: float
    num_tokens: Count
    entropy: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


@validated(frozen=True, kw_only=True, config=_STRICT)
class Outcome:
    """A query and what is known of each model's answer to it, by model name.

    `scores` are quality in [0, 1] (1 means right). `tags` name the task or domain; `split` the
    part of the data it belongs to; `answer` is the reference. `outputs` are the models' texts,
    `costs` US dollars, `output_tokens` their lengths.

    Since `format` 2: `energies` in watt-hours, `latencies` in seconds, and `grades`, what each
    grader said of each model on its own scale.
    """

    query: str
    scores: dict[str, Score] = Field(min_length=1)
    id: str = ""
    tags: tuple[str, ...] = ()
    split: str | None = None
    answer: str | None = None
    outputs: dict[str, str] = field(default_factory=dict)
    logprobs: dict[str, AnswerLogprobs] = field(default_factory=dict)
    prompt_tokens: Count | None = None
    output_tokens: dict[str, Count] = field(default_factory=dict)
    costs: dict[str, Amount] = field(default_factory=dict)
    format: Literal[1, 2] = 1
    energies: dict[str, Amount] = field(default_factory=dict)
    latencies: dict[str, Amount] = field(default_factory=dict)
    grades: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """Scores as an array [num_queries, num_models], NaN where a model's score is unknown."""

    models: tuple[str, ...]
    scores_QM: NDArray[np.float64]


_ADAPTER = TypeAdapter(Outcome)
_OLD = ("format", 1)


def read_outcomes(path: Path | str, *, split: str | None = None) -> list[Outcome]:
    """Read a JSON Lines file of outcomes; blank lines are skipped.

    With `split`, only that part. Raises `OutcomesError` naming file, line and key for the first
    bad line, for an empty file and for a split that nothing belongs to.
    """
    path = Path(path)
    outcomes = list(_read(path))
    if not outcomes:
        raise OutcomesError(f"{path}: the file holds no outcomes")
    return of_split(path, outcomes, split)


def of_split(path: Path, outcomes: list[Outcome], split: str | None) -> list[Outcome]:
    """Return the outcomes of `split` (None: all); `OutcomesError` names `path` where none are."""
    if split is None:
        return outcomes
    chosen = [outcome for outcome in outcomes if outcome.split == split]
    if not chosen:
        known = sorted({str(outcome.split) for outcome in outcomes})
        raise OutcomesError(f"{path}: split {split!r} is unknown; the file has {', '.join(known)}")
    return chosen


def write_outcomes(path: Path | str, outcomes: Iterable[Outcome]) -> None:
    """Write outcomes as JSON Lines, one object per line, fields that say nothing left out."""
    with replacing(Path(path)) as fresh, fresh.open("w", encoding="utf-8") as file:
        for outcome in outcomes:
            file.write(json.dumps(_to_json(outcome), ensure_ascii=False) + "\n")


def score_table(outcomes: Sequence[Outcome], models: Sequence[str] | None = None) -> ScoreTable:
    """Return the scores of `models` (default: all, in order of first mention) as an array.

    Raises `OutcomesError` for a model that no outcome scores.
    """
    known = dict.fromkeys(name for outcome in outcomes for name in outcome.scores)
    for name in models or ():
        if name not in known:
            raise OutcomesError(
                f"the model {name!r} has no scores in these outcomes; they have {', '.join(known)}"
            )
    names = tuple(models or known)
    nan = float("nan")
    rows = [[outcome.scores.get(name, nan) for name in names] for outcome in outcomes]
    return ScoreTable(models=names, scores_QM=np.array(rows, np.float64))


def content_sha256(outcomes: Iterable[Outcome]) -> str:
    """Return a hash of the queries, tags and scores: what a router was trained on."""
    digest = hashlib.sha256()
    for outcome in outcomes:
        known = [outcome.query, list(outcome.tags), sorted(outcome.scores.items())]
        digest.update(json.dumps(known).encode() + b"\n")
    return digest.hexdigest()


def _read(path: Path) -> Iterator[Outcome]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _read_line(path, number, line)
    except OSError as error:
        raise OutcomesError(f"{path} cannot be read: {error.strerror}") from None


def _read_line(path: Path, number: int, line: bytes) -> Outcome:
    try:
        return _ADAPTER.validate_json(line)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in detail["loc"]) or "the line"
        raise OutcomesError(
            f"{path}, line {number}: {key}: {detail['msg']}, got {_shorten(detail['input'])}"
        ) from None


def _shorten(value: Any, limit: int = 80) -> str:  # noqa: ANN401 - whatever the file held
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def _to_json(outcome: Outcome) -> Mapping[str, Any]:
    data = asdict(outcome)
    for known in data["logprobs"].values():
        if known["entropy"] is None:
            del known["entropy"]
    return {
        key: value
        for key, value in data.items()
        if key in ("query", "scores") or (value not in ("", (), {}, None) and (key, value) != _OLD)
    }


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
