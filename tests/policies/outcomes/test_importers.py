"""Other evaluations' logs are read as outcomes, in the layouts that their programs write."""

import json
from pathlib import Path
from typing import Any

import pytest

from policies.errors import OutcomesError
from policies.importers.load import load_outcomes
from policies.outcomes import write_outcomes


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


def test_other_metrics_and_conversations_of_lm_evaluation_harness(tmp_path: Path) -> None:
    """A task's own metric is named in the line; a conversation's query is what it says last."""
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    row = sample(0, 1.0, named=True) | {"metrics": ["mc2", "chrf"], "mc2": 0.25, "chrf": 70.0}
    del row["exact_match,strict"]
    for told in (json.dumps(said), [json.dumps(said)]):
        row["arguments"] = {"gen_args_0": {"arg_0": told}}
        [outcome] = load_outcomes(write(tmp_path / "ada" / "samples_tqa_2026-11-01.jsonl", row))
        assert (outcome.query, outcome.scores) == ("2+2?", {"ada": 0.25})


def test_half_characters_are_marked(tmp_path: Path) -> None:
    """Programs that cut texts write halves of emoji, which could not be written again."""
    row = sample(0, 1.0, named=False) | {"target": "7\ud83d", "filtered_resps": ["\udc1f7"]}
    row["arguments"] = [["a\ud83db", {}]]
    logged = load_outcomes(write(tmp_path / "ada" / "samples_x_2026-11-01.jsonl", row))
    own = {"query": "a\ud83db", "scores": {"ada": 1}, "answer": "7\ud83d"}
    for [outcome] in (logged, load_outcomes(write(tmp_path / "own.jsonl", own))):
        assert (outcome.query, outcome.answer) == ("a\ufffdb", "7\ufffd")
    write_outcomes(tmp_path / "again.jsonl", logged)
    assert load_outcomes(tmp_path / "again.jsonl") == logged


@pytest.mark.parametrize("missing", ["", "nan", "NaN", "None", "N/A"])
def test_cells_without_a_value_are_missing(tmp_path: Path, missing: str) -> None:
    """However a spreadsheet or a data frame writes them, in scores and in costs."""
    table = tmp_path / "mmlu_sums.csv"
    table.write_text(f"prompt,ada,bob\n2+2?,{missing},TRUE\n")
    assert load_outcomes(table)[0].scores == {"bob": 1}
    bench = tmp_path / "bench.csv"
    bench.write_text(
        "prompt,eval_name,ada,ada|total_cost,bob,bob|total_cost\n"
        f"2+2?,sums,{missing},{missing},False,{missing}\n"
    )
    assert (load_outcomes(bench)[0].scores, load_outcomes(bench)[0].costs) == ({"bob": 0}, {})


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


def test_a_log_of_openai_evals_whose_judge_is_a_model(tmp_path: Path) -> None:
    """The score is among the metrics; the first sampling is the answer, the second the judge's."""
    parts = [{"type": "text", "text": "2+2"}]
    file = write(
        tmp_path / "log.jsonl",
        {"spec": {"completion_fns": ["ada"], "eval_name": "sums"}},
        *(
            {"sample_id": "s", "type": "sampling", "data": {"prompt": prompt, "sampled": [said]}}
            for prompt, said in (([{"role": "user", "content": parts}], "4"), ("Right?", "Y"))
        ),
        {"sample_id": "s", "type": "metrics", "data": {"choice": "Y", "score": 0.5}},
        {"sample_id": "s", "type": "metrics", "data": {"accuracy": 1}},
    )
    [outcome] = load_outcomes(file)
    assert (outcome.query, outcome.scores, outcome.outputs) == ("2+2", {"ada": 0.5}, {"ada": "4"})


def test_an_answer_that_several_filters_read_counts_once(tmp_path: Path) -> None:
    """The harness writes a line per filter; the first filter's score is the score."""
    file = write(
        tmp_path / "ada" / "samples_gsm8k.jsonl",
        *(
            {**sample(number, right, named=True), "filter": name}
            for name, right in (("strict-match", 0.0), ("flexible-extract", 1.0))
            for number in range(2)
        ),
    )
    assert [outcome.scores for outcome in load_outcomes(file)] == [{"ada": 0}] * 2


def test_routellm_as_csv(tmp_path: Path) -> None:
    """A column per model, responses in others; an empty cell is missing, what leaked left out."""
    file = tmp_path / "gsm8k_responses.csv"
    file.write_text('prompt,a,b,a_response,b_response\nwhy,True,,"x, y",\nleaked,True,True,,\n')
    write(tmp_path / "contaminated_prompts.jsonl", {"eval_prompt": "leaked"})
    [outcome] = load_outcomes(file)
    assert outcome.scores == {"a": 1} and outcome.outputs == {"a": "x, y"}
    assert outcome.tags == ("gsm8k",)
    assert load_outcomes(tmp_path) == [outcome]


def test_cells_may_hold_whole_documents(tmp_path: Path) -> None:
    """More than the csv module allows by itself."""
    file = tmp_path / "LONG.CSV"
    file.write_text(f"prompt,eval_name,ada,ada|total_cost\n{'x' * 200_000},math,1,1\n")
    assert len(load_outcomes(file)[0].query) == 200_000


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
    """The file, the line and what is missing; a folder of nothing says what may be there."""
    row = {"doc": {}, "resps": [], "arguments": [["q"]]}
    file = write(tmp_path / "bad" / "samples_x.jsonl", {**row, "acc": 1}, row)
    with pytest.raises(OutcomesError, match=r"samples_x.jsonl, line 2: it has no metric; known"):
        load_outcomes(file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(OutcomesError, match="lm-evaluation-harness"):
        load_outcomes(tmp_path / "empty")


ARENA = {"global_index": "g_1", "llm_selected": "a", "question": "q"}
MATCH = {"sample_id": "s", "type": "match", "data": {"correct": True}}


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        (
            "a.jsonl",
            [{"candidates": [{"model": "a", "scores": {"score": 1}}]}, {"candidates": None}],
            "line 2: TypeError: .*; expected MixInstruct: instruction, and candidates of model",
        ),
        (
            "a.jsonl",
            [{"candidates": [{"model": "a", "scores": {"score": 10**400}}]}],
            "line 1: OverflowError: int too large to convert to float; expected MixInstruct",
        ),
        (
            "a.jsonl",
            [{"candidates": [{"model": "a", "scores": {"score": 7}}]}],
            "line 1: scores.a: .*less than or equal to 1, got 7.0",
        ),
        (
            "a.jsonl",
            [{"candidates": [{"model": "a", "scores": {}}], "cmp_results": {"a,b": "a wins"}}],
            "line 1: a,b: 'a wins' is none of A is better, B is better, Same good, Same bad",
        ),
        (
            "a.jsonl",
            [{"spec": {"completion_fns": ["a"]}}, {**MATCH, "data": {}}],
            "line 2: the key 'correct' is missing; expected a log of OpenAI's evals",
        ),
        (
            "a.jsonl",
            [{**ARENA, "evaluation_result": {"score": 1}}, "{"],
            "line 2: it is not JSON: .*; expected RouterArena's cached results: global_index",
        ),
        (
            "a.jsonl",
            [{**ARENA, "evaluation_result": {"score": 85}}],
            "line 1: scores.a: .*less than or equal to 1, got 85.0",
        ),
        ("a.csv", ["prompt,eval_name,a,a|total_cost", "q,t,1"], "line 2: it has not as many cells"),
        ("a.csv", ["prompt,eval_name,a,a|total_cost", "q,t,x,"], "line 2: ValueError: could not"),
        ("a.csv", ["prompt,eval_name,a,a|total_cost", "q,t,inf,"], "line 2: scores.a: .*finite"),
        ("a.csv", ["question,a", "q,1"], "line 2: the key 'prompt' is missing; expected RouterBe"),
        ("a.csv", ["prompt,eval_name"], "the file holds no answer with a score; expected RouterB"),
    ],
)
def test_the_bad_line_is_named_with_what_is_allowed(
    tmp_path: Path, name: str, lines: list[Any], message: str
) -> None:
    """Of each format, so that whoever wrote the file can mend it."""
    file = tmp_path / name
    file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    with pytest.raises(OutcomesError, match=message) as caught:
        load_outcomes(file)
    assert str(file) in str(caught.value)


def test_other_systems_files_are_read_as_any(tmp_path: Path) -> None:
    """A mark of the encoding at the beginning and returns at the lines' ends do not count."""
    table = "prompt,eval_name,ada,ada|total_cost\r\nq,math,1,\r\np,math,,\r\n"
    (tmp_path / "table.csv").write_bytes(b"\xef\xbb\xbf" + table.encode())
    [outcome] = load_outcomes(tmp_path / "table.csv")  # nobody has answered the other query
    assert outcome.query == "q" and outcome.scores == {"ada": 1}
    row = json.dumps({**ARENA, "evaluation_result": {"score": 1}})
    (tmp_path / "log.jsonl").write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n")
    assert load_outcomes(tmp_path / "log.jsonl")[0].scores == {"a": 1}


@pytest.mark.parametrize("name", ["outcomes.jsonl", "outcomes.json"])
def test_a_file_nested_beyond_reading_is_named(tmp_path: Path, name: str) -> None:
    """Whatever program's outcomes it might hold."""
    (tmp_path / name).write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(OutcomesError, match=f"{name}, line 1: .*nested too deeply"):
        load_outcomes(tmp_path / name)
