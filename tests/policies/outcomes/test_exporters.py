"""What is written in another program's format comes back as it was, as far as the format goes."""

from pathlib import Path

import pytest

from policies.errors import OutcomesError
from policies.exporters import FORMATS, export_outcomes
from policies.importers.load import load_outcomes
from policies.outcomes import Outcome

FILES = {"mixinstruct": "outcomes.jsonl", "routerbench": "outcomes.csv"}
# What each format has room for beside query, scores and the first tag.
KEPT = {
    "evals": {"outputs", "answer"},
    "llmrouter": {"split"},
    "lm-eval": {"outputs", "answer"},
    "mixinstruct": {"outputs", "answer"},
    "routellm": set(),
    "routerarena": {"outputs", "answer", "costs", "prompt_tokens", "output_tokens"},
    "routerbench": {"outputs", "costs"},
}
ROUGH = [0.25, 0.0, 1.0, 0.75]


def outcomes(*, binary: bool) -> list[Outcome]:
    """Return four queries of two tasks and two models; without `binary` one score is missing."""
    rows = []
    for n in range(4):
        scores = {"ada": float(n % 2), "org/bob": float(n > 1)}
        if not binary:
            scores["ada"] = ROUGH[n]
            if n == 3:
                del scores["org/bob"]
        rows.append(
            Outcome(
                query=f'Say, "{n}"\nin Ελλάδα',
                scores=scores,
                tags=("sums" if n % 2 else "big/words",),
                split="test" if n == 2 else "train",
                answer=str(n),
                outputs={name: f"{name} says {n}" for name in scores},
                prompt_tokens=7 + n,
                output_tokens=dict.fromkeys(scores, n),
                costs=dict.fromkeys(scores, 0.25 * n),
            )
        )
    return rows


@pytest.mark.parametrize(
    ("format", "binary"),
    # RouteLLM's format knows right or wrong only.
    [
        (name, binary)
        for name in FORMATS
        for binary in (True, False)
        if binary or name != "routellm"
    ],
)
def test_a_round_trip_keeps_what_the_format_holds(
    tmp_path: Path, format: str, binary: bool
) -> None:
    """Scores, right or wrong or between, missing ones, tasks, and what the table promises."""
    written = outcomes(binary=binary)
    out = tmp_path / FILES.get(format, "folder")
    assert export_outcomes(written, out, format=format) == 4
    found = {row.query: row for row in load_outcomes(out)}
    assert set(found) == {row.query for row in written}
    # A folder's name cannot hold a slash, so that lm-evaluation-harness's models lose it.
    plain = (lambda text: text.replace("/", "__")) if format == "lm-eval" else str
    for row in written:
        again = found[row.query]
        assert again.scores == {plain(name): score for name, score in row.scores.items()}
        assert again.tags[0].replace("/", "__") == row.tags[0].replace("/", "__")
        for name in KEPT[format]:
            value = getattr(row, name)
            if isinstance(value, dict):
                value = {plain(model): one for model, one in value.items()}
            assert getattr(again, name) == value, name


def test_what_a_format_cannot_hold_is_said(tmp_path: Path) -> None:
    """RouteLLM's scores are right or wrong; an unknown format names those that there are."""
    with pytest.raises(OutcomesError, match=r"routellm: ada scores 0.25 on .* right \(1\) and"):
        export_outcomes(outcomes(binary=False), tmp_path / "folder", format="routellm")
    with pytest.raises(OutcomesError, match="'xml' is unknown; allowed are evals, llmrouter"):
        export_outcomes(outcomes(binary=True), tmp_path / "folder", format="xml")


def test_only_queries_that_all_models_answered_become_rows_of_a_column_each(
    tmp_path: Path,
) -> None:
    """RouteLLM's table has no cell for an unknown score: the number says what was left out."""
    rows = outcomes(binary=True)
    del rows[0].scores["ada"]
    assert export_outcomes(rows, tmp_path, format="routellm") == 3
    assert len(load_outcomes(tmp_path)) == 3
