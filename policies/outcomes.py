"""What every model answered to real queries: the format that routers and cascades learn from.

JSON Lines of one query and how well each model answered it. Only `query` and `scores` are required.
A query may have scores for some models only: a ledger knows the one model that answered, a
benchmark knows all. `importers` reads other formats, `outcome_sets` merges, divides and sums up.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as validated

from policies.errors import OutcomesError
from policies.files import replacing
from policies.json_text import read_json_text, whole_text
from policies.kinds import short

# Far beyond anything real, and far below where sums and squares of such numbers overflow.
_MOST: Final = 10**15

Score: TypeAlias = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count: TypeAlias = Annotated[int, Field(ge=0, le=_MOST)]
Finite: TypeAlias = Annotated[float, Field(ge=-_MOST, le=_MOST, allow_inf_nan=False)]
Text: TypeAlias = Annotated[str, AfterValidator(whole_text)]
Amount: TypeAlias = Annotated[float, Field(ge=0, le=_MOST, allow_inf_nan=False)]

_STRICT = ConfigDict(extra="forbid")


@validated(frozen=True, kw_only=True, config=_STRICT)
class AnswerLogprobs:
    """Natural log-probabilities of one answer's tokens: their mean, least, and number.

    `entropy` is the mean entropy, in nats, of the distributions that the tokens were drawn from;
    None where nobody kept it.
    """

    mean: Finite
    min: Finite
    num_tokens: Count
    entropy: Amount | None = None


@validated(frozen=True, kw_only=True, config=_STRICT)
class Outcome:
    """A query and what is known of each model's answer to it, by model name.

    `scores` are quality in [0, 1] (1 means right). `tags` name the task or domain; `split` the
    part of the data it belongs to; `answer` is the reference. `outputs` are the models' texts,
    `costs` US dollars, `output_tokens` their lengths.

    Since `format` 2: `energies` in watt-hours, `latencies` in seconds, and `grades`, what each
    grader said of each model on its own scale.
    """

    query: Text
    scores: dict[str, Score] = Field(min_length=1)
    id: str = ""
    tags: tuple[Text, ...] = ()
    split: str | None = None
    answer: Text | None = None
    outputs: dict[str, Text] = field(default_factory=dict)
    logprobs: dict[str, AnswerLogprobs] = field(default_factory=dict)
    prompt_tokens: Count | None = None
    output_tokens: dict[str, Count] = field(default_factory=dict)
    costs: dict[str, Amount] = field(default_factory=dict)
    format: Literal[1, 2] = 1
    energies: dict[str, Amount] = field(default_factory=dict)
    latencies: dict[str, Amount] = field(default_factory=dict)
    grades: dict[str, dict[str, Finite]] = field(default_factory=dict)


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
        known = sorted({outcome.split for outcome in outcomes if outcome.split is not None})
        has = "the file has " + (", ".join(known) or "none; shoal outcomes split marks them")
        raise OutcomesError(f"{path}: split {split!r} is unknown; {has}")
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
                # Some editors and spreadsheets begin a file with a mark of its encoding.
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if text.strip():
                    yield _read_line(path, number, text)
    except OSError as error:
        raise OutcomesError(f"{path} cannot be read: {error.strerror}") from None


def _read_line(path: Path, number: int, line: bytes) -> Outcome:
    try:
        return _ADAPTER.validate_python(read_json_text(line))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in detail["loc"]) or "the line"
        raise OutcomesError(
            f"{path}, line {number}: {key}: {detail['msg']}, got {short(detail['input'])}"
        ) from None
    except ValueError as error:
        raise OutcomesError(f"{path}, line {number}: the line is not JSON: {error}") from None


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
