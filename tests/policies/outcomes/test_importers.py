"""Other evaluations' logs are read as outcomes, in the layouts that their programs write."""

import json
from pathlib import Path
from typing import Any

import pytest

from policies.errors import OutcomesError
from policies.importers import load_outcomes


def write(file: Path, *rows: Any) -> Path:
    """Write JSON Lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return file


def sample(number: int, right: float, *, named: bool) -> dict[str, Any]:
    """A line of lm-evaluation-harness, of a version that names arguments or one that does not."""
    prompt = f"Question: {number}\nAnswer:"
    return {
        "doc_id": number,
        "doc": {"question": str(number)},
        "target": "7",
        "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {}}} if named else [[prompt, {}]],
        "resps": [["It is 7"]],
        "filtered_resps": ["7"],
        "exact_match,strict" if named else "exact_match": right,
    }


def test_a_folder_of_lm_evaluation_harness_is_one_set_of_outcomes(tmp_path: Path) -> None:
    """A folder per model; the same question of several models is one outcome."""
    for model, right, named in (("ada", 1.0, True), ("bob", 0.0, False)):
        write(
            tmp_path / model / "samples_gsm8k_2026-11-01T10-00-00.jsonl",
            *(sample(number, right, named=named) for number in range(2)),
        )
    first, second = load_outcomes(tmp_path)
    assert first.query == "Question: 0\nAnswer:" and first.tags == ("gsm8k",)
    assert first.scores == second.scores == {"ada": 1, "bob": 0}
    assert first.outputs == {"ada": "7", "bob": "7"} and first.answer == "7"


def test_a_log_of_openai_evals(tmp_path: Path) -> None:
    """The prompt is the last message of the sampling before the match."""
    file = write(
        tmp_path / "log.jsonl",
        {"spec": {"completion_fns": ["ada"], "base_eval": "sums"}},
        {
            "sample_id": "s.0",
            "type": "sampling",
            "data": {"prompt": [{"role": "user", "content": "2+2"}], "sampled": ["4"]},
        },
        {"sample_id": "s.0", "type": "match", "data": {"correct": True, "expected": ["4"]}},
        {"final_report": {"accuracy": 1}},
    )
    [outcome] = load_outcomes(file)
    assert (outcome.query, outcome.answer, outcome.tags) == ("2+2", "4", ("sums",))
    assert outcome.scores == {"ada": 1} and outcome.outputs == {"ada": "4"}


def test_mixinstruct_scores_are_win_rates(tmp_path: Path) -> None:
    """Ties count half; without comparisons it is the BERTScore."""
    candidates = [
        {"model": name, "text": name.upper(), "scores": {"bertscore": 0.25}} for name in "abc"
    ]
    judged = {"a,b": "A is better", "a,c": "Same good", "b,c": "B is better"}
    row = {"id": "itwt/1", "instruction": "Say", "input": "hi", "output": "hi"}
    file = write(
        tmp_path / "test.jsonl",
        {**row, "candidates": candidates, "cmp_results": json.dumps(judged)},
        {**row, "id": "itwt/2", "candidates": candidates, "cmp_results": None},
    )
    first, second = load_outcomes(file)
    assert first.query == "Say\nhi" and first.tags == ("itwt",)
    assert first.scores == {"a": 0.75, "b": 0, "c": 0.75}
    assert second.scores == dict.fromkeys("abc", 0.25) and second.outputs["a"] == "A"


def test_routerbench_as_csv(tmp_path: Path) -> None:
    """Models are the columns with a cost beside them; an empty score is a missing one."""
    file = tmp_path / "routerbench.csv"
    file.write_text(
        "sample_id,prompt,eval_name,ada,ada|model_response,ada|total_cost,bob,bob|total_cost\n"
        'm.1,"2+2, say",math,1.0,4,0.002,,\n'
    )
    [outcome] = load_outcomes(file)
    assert outcome.query == "2+2, say" and outcome.tags == ("math",)
    assert outcome.scores == {"ada": 1} and outcome.costs == {"ada": 0.002}


def test_what_is_not_as_its_format_says_is_named(tmp_path: Path) -> None:
    """The file and what is missing; a folder of nothing says what may be there."""
    row = {"doc": {}, "resps": [], "arguments": [["q"]]}
    file = write(tmp_path / "bad" / "samples_x.jsonl", row)
    with pytest.raises(OutcomesError, match=r"samples_x.jsonl: ValueError: no metric among"):
        load_outcomes(file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutcomesError, match="lm-evaluation-harness"):
        load_outcomes(tmp_path / "empty")
