"""Published data of routers: MixInstruct, RouterBench, RouteLLM, RouterArena and LLMRouter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from policies.errors import OutcomesError
from policies.importers.rows import MORE, Rows, reading, said_by, told_cells, why
from policies.json_text import UNREADABLE, read_json_text
from policies.outcomes import Outcome

RIGHT_OR_WRONG: Final = "prompt, and True or False per model"
_SAID: Final = "_response"
_COST: Final = "|total_cost"
_CONTAMINATED: Final = "contaminated_prompts.jsonl"
_TASKS: Final = "example_data/query_data/default_query_{}.jsonl"
_RIGHT: Final = {"true": 1.0, "false": 0.0}
_TIE: Final = (0.5, 0.5)
_LABELS: Final = {
    "A is better": (1.0, 0.0),
    "B is better": (0.0, 1.0),
    "Same good": _TIE,
    "Same bad": _TIE,
}


def read_mixinstruct(_: Path, rows: Rows) -> Iterator[Outcome]:
    """Read MixInstruct: a model's score is the share of its comparisons that it won, ties half.

    Where candidates bring a `score` along, it is that; without `cmp_results`, the BERTScore.
    """
    for row in rows:
        candidates = {str(one["model"]): one for one in row["candidates"]}
        own = {
            n: one["scores"]["score"] for n, one in candidates.items() if "score" in one["scores"]
        }
        judged = row.get("cmp_results")
        results = read_json_text(judged) if isinstance(judged, str) else judged
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


def read_routerbench(_: Path, rows: Rows) -> Iterator[Outcome]:
    """Read RouterBench as CSV: a column of scores per model, its response and its cost beside.

    A query that no model has a score of is left out.
    """
    for row in rows:
        if MORE in row or None in row.values():
            raise OutcomesError("it has not as many cells as the head has columns")
        models = [key.removesuffix(_COST) for key in row if key.endswith(_COST)]
        scores = {
            name: _RIGHT.get(cell.lower(), cell) for name, cell in told_cells(row, models).items()
        }
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
                for key, cost in told_cells(row, [name + _COST for name in scores]).items()
            },
        )


def read_routellm(file: Path, rows: Rows) -> Iterator[Outcome]:
    """Read RouteLLM's `gsm8k_responses.csv`, or one subject of its MMLU answers.

    Leaves out what the `contaminated_prompts.jsonl` beside it, or above, names.
    """
    lists = (folder / _CONTAMINATED for folder in (file.parent, file.parent.parent))
    listed = next(filter(Path.is_file, lists), None)
    yield from _right_or_wrong(file, rows, _contaminated(listed) if listed else frozenset())


def _contaminated(file: Path) -> frozenset[str]:
    with reading(file, "eval_prompt") as rows:
        return frozenset(str(row["eval_prompt"]) for row in rows)


def _right_or_wrong(file: Path, rows: Rows, contaminated: frozenset[str]) -> Iterator[Outcome]:
    """Read a column of True and False per model, perhaps with its responses in another.

    An empty cell is a missing score. The file's name is the tag.
    """
    subject = file.stem.removeprefix("mmlu_").removesuffix(_SAID + "s")
    for row in rows:
        if MORE in row or None in row.values():
            raise OutcomesError("it has not as many cells as the head has columns")
        prompt = row.pop("prompt")
        said_of = {name: name.removesuffix(_SAID) for name in row if name.endswith(_SAID)}
        models = [name for name in row if said_of.get(name) not in row]
        told = told_cells(row, models)
        if not {cell.lower() for cell in told.values()} <= _RIGHT.keys():
            raise OutcomesError(f"it has {told}")
        if prompt not in contaminated and told:
            said = {name: row[name + _SAID] for name in told if row.get(name + _SAID)}
            scores = {name: _RIGHT[cell.lower()] for name, cell in told.items()}
            yield Outcome(query=prompt, scores=scores, tags=(subject,), outputs=said)


def read_routerarena(_: Path, rows: Rows) -> Iterator[Outcome]:
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
            outputs=said_by(model, row.get("generated_answer")),
            prompt_tokens=tokens.get("input_tokens"),
            output_tokens={} if written is None else {model: int(written)},
            costs={} if usd is None else {model: float(usd)},
        )


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
        with reading(file, RIGHT_OR_WRONG) as rows:
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
        with reading(folder / _TASKS.format(split), "query and task_name") as rows:
            tasks |= {str(row["query"]): str(row["task_name"]) for row in rows}
    for split in ("train", "test"):
        file = folder / "dcrouter_preprocessed" / f"{split}.json"
        with reading(file, "a list of question and scores"):
            entries = read_json_text(file.read_bytes())
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
            except UNREADABLE as error:
                raise OutcomesError(
                    f"{file}, entry {number}: {why(error)}; expected question, and scores by model"
                ) from None
        seen = {outcome.query.strip() for outcome in outcomes}
    return outcomes
