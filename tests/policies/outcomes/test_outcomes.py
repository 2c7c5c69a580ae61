"""The outcomes format and the importers of published data."""

import json
from pathlib import Path

import numpy as np
import pytest

from policies.errors import OutcomesError
from policies.importers.benchmarks import import_llmrouter, import_routellm_mmlu
from policies.importers.load import load_outcomes
from policies.outcomes import Outcome, content_sha256, read_outcomes, score_table, write_outcomes

DATA = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "routing"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no published data at {DATA}")

FULL = {
    "id": "test-1",
    "query": "What is 2 + 2?\u2028Say it.",
    "tags": ["arithmetic"],
    "split": "test",
    "answer": "4",
    "scores": {"ada": 1, "bob": 0.5},
    "outputs": {"ada": "4", "bob": "5"},
    "logprobs": {
        "ada": {"mean": -0.1, "min": -0.2, "num_tokens": 2, "entropy": 0.3},
        "bob": {"mean": -0.1, "min": -0.2, "num_tokens": 1},
    },
    "prompt_tokens": 9,
    "output_tokens": {"ada": 2},
    "costs": {"ada": 1e-6},
}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    """Every field survives a round trip, and fields that say nothing are not written."""
    (tmp_path / "in.jsonl").write_text(json.dumps(FULL) + "\n\n" + '{"query":"","scores":{"a":0}}')
    outcomes = read_outcomes(tmp_path / "in.jsonl")
    write_outcomes(tmp_path / "out.jsonl", outcomes)
    assert read_outcomes(tmp_path / "out.jsonl") == outcomes
    assert outcomes[0].scores == {"ada": 1.0, "bob": 0.5}
    second = (tmp_path / "out.jsonl").read_text().split("\n")[1]
    assert json.loads(second) == {"query": "", "scores": {"a": 0.0}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: the line is not JSON"),
        ("[]", "line 2: the line"),
        ('{"scores": {"ada": 1}}', "line 2: query: Field required"),
        ('{"query": "q"}', "line 2: scores: Field required"),
        ('{"query": "q", "scores": {}}', "line 2: scores"),
        ('{"query": "q", "scores": {"ada": 1.5}}', r"line 2: scores.ada.*less than or equal to 1"),
        ('{"query": "q", "scores": {"ada": NaN}}', "line 2: scores.ada"),
        ('{"query": "q", "scores": {"ada": 1}, "score": 1}', "line 2: score: "),
        (
            '{"query": "q", "scores": {"a": 1}, "logprobs": '
            '{"a": {"mean": NaN, "min": -1, "num_tokens": 1}}}',
            "line 2: logprobs.a.mean: .*finite",
        ),
        ('{"query": "q", "scores": {"a": 1}, "grades": {"g": {"a": NaN}}}', "grades.g.a: .*finite"),
        ('{"query": "q", "scores": {"ada": 1}, "prompt_tokens": -1}', "line 2: prompt_tokens"),
        (
            '{"query": "q", "scores": {"ada": 1}, "output_tokens": {"ada": 1%s}}' % ("0" * 400),
            "output_tokens.ada: .*less than or equal",
        ),
        (
            '{"query": "q", "scores": {"ada": 1}, "costs": {"ada": 1e308}}',
            "costs.ada: .*less than or equal",
        ),
        ('{"query": 7, "scores": {"ada": 1}}', "line 2: query"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    """The error names file, line and key, so that the line can be found and mended."""
    file = tmp_path / "bad.jsonl"
    file.write_text('{"query": "fine", "scores": {"ada": 1}}\n' + line + "\n")
    with pytest.raises(OutcomesError, match=message) as caught:
        read_outcomes(file)
    assert str(file) in str(caught.value)


def test_files_without_the_wanted_outcomes_are_refused(tmp_path: Path) -> None:
    """Missing and empty files and unknown splits are errors, not empty lists."""
    with pytest.raises(OutcomesError, match="cannot be read"):
        read_outcomes(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(OutcomesError, match="holds no outcomes"):
        read_outcomes(tmp_path / "empty.jsonl")
    write_outcomes(tmp_path / "one.jsonl", [Outcome(query="q", scores={"a": 1}, split="train")])
    with pytest.raises(OutcomesError, match="'test' is unknown; the file has train"):
        read_outcomes(tmp_path / "one.jsonl", split="test")


def test_a_mark_of_the_encoding_and_returns_do_not_count(tmp_path: Path) -> None:
    """Files that spreadsheets and editors of other systems wrote are read as any."""
    file = tmp_path / "one.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"query": "q", "scores": {"a": 1}}\r\n\r\n')
    assert load_outcomes(file) == [Outcome(query="q", scores={"a": 1})]


def test_unknown_scores_are_nan() -> None:
    """A query need not have scores for every model; the table leaves the rest open."""
    outcomes = [Outcome(query="p", scores={"a": 1}), Outcome(query="q", scores={"b": 0, "a": 0})]
    table = score_table(outcomes)
    assert table.models == ("a", "b")
    np.testing.assert_array_equal(table.scores_QM, [[1, np.nan], [0, 0]])
    with pytest.raises(OutcomesError, match="'c' has no scores"):
        score_table(outcomes, ["c"])


def test_the_hash_depends_on_what_is_learned_from() -> None:
    """Another score or query changes the hash, the order of models in the file does not."""
    one = Outcome(query="q", scores={"a": 1, "b": 0})
    same = Outcome(query="q", scores={"b": 0, "a": 1})
    other = Outcome(query="q", scores={"a": 1, "b": 1})
    assert content_sha256([one]) == content_sha256([same]) != content_sha256([other])


@needs_data
def test_routellm_has_the_published_rows_and_accuracies() -> None:
    """14,037 questions; weak 68.09%, strong 80.59%."""
    outcomes = import_routellm_mmlu(DATA / "RouteLLM" / "mmlu")
    table = score_table(outcomes)
    assert len(outcomes) == 14_037
    np.testing.assert_allclose(table.scores_QM.mean(0), [0.6809, 0.8059], atol=5e-5)
    assert outcomes[0].tags == ("abstract_algebra",)


@needs_data
def test_llmrouter_has_381_clean_test_questions() -> None:
    """Questions that stand in both parts are marked; best single 59.7%, oracle 74.98%."""
    outcomes = import_llmrouter(DATA / "LLMRouter")
    clean = [outcome for outcome in outcomes if outcome.split == "test"]
    scores = score_table(clean).scores_QM
    assert (len(outcomes), len(clean), scores.shape[1]) == (6108, 381, 9)
    assert scores.mean(0).max() == pytest.approx(0.597, abs=5e-4)
    assert scores.max(1).mean() == pytest.approx(0.7498, abs=5e-5)
    assert all(outcome.tags for outcome in clean)


def test_folders_of_published_data_are_outcomes_too(tmp_path: Path) -> None:
    """A folder is read by what lies in it, a file as JSON Lines; any other folder is refused."""
    (tmp_path / "responses").mkdir()
    (tmp_path / "contaminated_prompts.jsonl").write_text('{"eval_prompt": "leaked"}\n')
    (tmp_path / "responses" / "mmlu_law.csv").write_text(
        "prompt,a,b\nwhy,True,False\nleaked,True,True"
    )
    [outcome] = load_outcomes(tmp_path)
    assert outcome == Outcome(query="why", scores={"a": 1, "b": 0}, tags=("law",))
    with pytest.raises(OutcomesError, match="split 'test' is unknown; the file has none; shoal"):
        load_outcomes(tmp_path, split="test")
    write_outcomes(tmp_path / "one.jsonl", [outcome])
    assert load_outcomes(tmp_path / "one.jsonl") == [outcome]
    with pytest.raises(OutcomesError, match="without responses/ or dcrouter_preprocessed/"):
        load_outcomes(tmp_path / "responses")


@needs_data
def test_llmrouters_folder_keeps_its_splits() -> None:
    """The clean test questions are the split "test" of LLMRouter's folder."""
    assert len(load_outcomes(DATA / "LLMRouter", split="test")) == 381


def test_importers_name_the_bad_place(tmp_path: Path) -> None:
    """A CSV cell that is neither True nor False is reported with its line."""
    (tmp_path / "contaminated_prompts.jsonl").write_text("")
    with pytest.raises(OutcomesError, match="no CSV file"):
        import_routellm_mmlu(tmp_path)
    (tmp_path / "responses").mkdir()
    (tmp_path / "responses" / "mmlu_law.csv").write_text("prompt,a,b\nwhy,True,maybe\n")
    with pytest.raises(OutcomesError, match=r"mmlu_law.csv, line 2: it has .*True or False per m"):
        import_routellm_mmlu(tmp_path)
    with pytest.raises(OutcomesError, match="cannot be read"):
        import_llmrouter(tmp_path)
