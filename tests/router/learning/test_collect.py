"""`shoal outcomes collect`: answers of a pool or a server, graded, resumable."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from models.pool import DEFAULT_POOL
from policies.outcomes import read_outcomes
from router.cli.main import app
from tests.router.conftest import write_pool
from tests.server import until
from tests.tiny_bert import save_bert

SCRIPTS = {
    "one": {"models": {"alpha": {"answers": ["4"]}, "beta": {"answers": ["It is 4"]}}},
    "two": {"answers": ["five"]},
}


def pool_at(folder: Path, **scripts: Any) -> Path:
    """Write a pool of three scripted models."""
    found = {**SCRIPTS, **scripts}
    engines = [{"name": name, "kind": "fake", "options": found[name]} for name in ("one", "two")]
    return write_pool(folder, engines=engines)


def questions_at(folder: Path, *lines: object) -> Path:
    """Write a file of questions, as they are or as JSON."""
    file = folder / "questions.jsonl"
    file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
    return file


def collect(queries: Path, out: Path, *options: str) -> Result:
    """Run the command."""
    words = ["outcomes", "collect", "--queries", str(queries), "--out", str(out), *options]
    return CliRunner().invoke(app, words)


def test_a_pools_answers_are_graded_and_kept_with_all_that_is_known(tmp_path: Path) -> None:
    """Scores, texts, log-probabilities, tokens, costs, energy and time of each model."""
    queries = questions_at(tmp_path, {"query": "2 + 2?", "reference": "4", "tags": ["sums"]})
    out = tmp_path / "outcomes.jsonl"
    result = collect(
        queries, out, "--pool", str(pool_at(tmp_path)), "--grade", "exact", "--grade", "contains"
    )
    assert result.exit_code == 0, result.output
    [outcome] = read_outcomes(out)
    assert outcome.query == "2 + 2?" and outcome.answer == "4" and outcome.tags == ("sums",)
    assert outcome.scores == {"alpha": 1, "beta": 0.5, "gamma": 0}
    assert outcome.outputs == {"alpha": "4", "beta": "It is 4", "gamma": "five"}
    assert outcome.grades["contains"] == {"alpha": 1, "beta": 1, "gamma": 0}
    # The fake engine writes a byte per token and ends with one that has no text.
    assert outcome.output_tokens == {"alpha": 2, "beta": 8, "gamma": 5}
    assert outcome.logprobs["beta"].num_tokens == 8
    assert outcome.logprobs["beta"].mean == pytest.approx(-0.1)
    read = outcome.prompt_tokens
    assert read is not None
    assert outcome.costs["alpha"] == pytest.approx((read + 2 * 2) / 1e6)
    assert set(outcome.energies) == set(outcome.latencies) == {"alpha", "beta", "gamma"}


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """What the journal knows is not asked again, a torn last line is forgotten."""
    queries = questions_at(tmp_path, *({"query": f"q{n}", "reference": "4"} for n in range(3)))
    out, pool = tmp_path / "outcomes.jsonl", pool_at(tmp_path)
    assert collect(queries, out, "--pool", str(pool)).exit_code == 0
    first = read_outcomes(out)
    journal = tmp_path / "outcomes.jsonl.journal"
    journal.write_text(journal.read_text() + '\n["torn", {"te')
    known = journal.read_bytes()
    out.unlink()
    # Another pace, as one that was interrupted may get, changes no answer.
    pool_at(tmp_path, two={**SCRIPTS["two"], "token_latency_s": 0.001})
    result = collect(queries, out, "--pool", str(pool))
    assert result.exit_code == 0, result.output
    assert read_outcomes(out) == first
    assert journal.read_bytes() == known, "something was asked or graded again"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_interrupts_is_told_that_it_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    """What is known by then is in the journal, and is not asked again; nothing else is left."""
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("nohup began these tests, and no command of it ends with the terminal")
    queries = questions_at(tmp_path, *({"query": f"q{n}", "reference": "4"} for n in range(60)))
    slow = {"answers": ["five"], "token_latency_s": 0.05}
    words = ["--out", tmp_path / "o.jsonl", "--pool", pool_at(tmp_path, two=slow)]
    command = ["outcomes", "collect", "--queries", queries, *words]
    journal, temporary = tmp_path / "o.jsonl.journal", tmp_path / "temporary"
    temporary.mkdir()
    with subprocess.Popen(
        [sys.executable, "-m", "router.cli", *map(str, command)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    ) as running:
        until(lambda: journal.exists() and journal.read_text().count("five") > 3)
        assert list(temporary.rglob("asked.db"))
        running.send_signal(number)
        _, told = running.communicate(timeout=60)
    assert list(temporary.iterdir()) == []
    assert running.returncode == 130
    assert told.splitlines()[-1] == "Interrupted; the same command goes on where it stopped."
    assert not (tmp_path / "o.jsonl").exists()
    known = journal.read_text()
    pool_at(tmp_path, two={"answers": ["five"]})
    assert collect(queries, tmp_path / "o.jsonl", "--pool", str(tmp_path)).exit_code == 0
    assert len(read_outcomes(tmp_path / "o.jsonl")) == 60
    assert journal.read_text().startswith(known)
    assert sum('"five"' in line for line in journal.read_text().splitlines()) == 60


@pytest.mark.parametrize("key", ["options", "system", "usd_per_million_output_tokens"])
def test_a_model_that_the_pool_file_changed_is_asked_again(tmp_path: Path, key: str) -> None:
    """Its engine's settings, its own, its price: an outcome holds what it costs, too."""
    queries = questions_at(tmp_path, {"query": "Who?", "reference": "4"})
    out, pool = tmp_path / "o.jsonl", pool_at(tmp_path)
    asked = []
    for changed in (False, True):
        content = yaml.safe_load(pool.read_text())
        if changed and key == "options":
            content["engines"][1]["options"] = {"answers": ["4"]}
        elif changed:
            content["models"][2][key] = "Be brief." if key == "system" else 1234.0
        pool.write_text(yaml.safe_dump(content))
        assert collect(queries, out, "--pool", str(pool)).exit_code == 0
        known = (tmp_path / "o.jsonl.journal").read_text().splitlines()
        asked.append(sum('"latency_s"' in line for line in known))
    assert asked == [3, 4], "gamma alone, once more"
    assert (read_outcomes(out)[0].outputs["gamma"] == "4") is (key == "options")


def test_a_full_disk_ends_the_run_with_a_sentence(tmp_path: Path) -> None:
    """The journal is named, and with room the run goes on."""
    queries = questions_at(tmp_path, {"query": "What is 2 + 2?", "reference": "4"})
    out, pool = tmp_path / "o.jsonl", pool_at(tmp_path)
    journal = tmp_path / "o.jsonl.journal"
    room = 2**22  # enough for all else that is written
    journal.write_bytes(b"\n" * (room - 100))
    words = ["outcomes", "collect", "--queries", queries, "--out", out, "--pool", pool]
    ended = subprocess.run(
        [sys.executable, "-c", "from router.cli.main import app; app()", *map(str, words)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2, ended.stderr
    assert f"shoal outcomes collect: {journal} cannot be written: " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not out.exists()
    assert collect(queries, out, "--pool", str(pool)).exit_code == 0
    assert len(read_outcomes(out)) == 1


def test_a_model_that_was_trained_again_is_asked_again(tmp_path: Path) -> None:
    """The pool stands where it stood, and its file says the same; the checkpoint has changed."""
    pool, out = tmp_path / "pool", tmp_path / "o.jsonl"
    pool.mkdir()
    for name in ("arithmetic", "text"):
        shutil.copytree(DEFAULT_POOL / name, pool / name)
    models = [{"name": n, "engine": "own", "checkpoint": n} for n in ("arithmetic", "text")]
    content = {"name": "p", "engines": [{"name": "own", "kind": "stacked"}], "models": models}
    (pool / "pool.yaml").write_text(yaml.safe_dump(content))
    queries = questions_at(tmp_path, {"query": "What is 41 + 17?", "reference": "58"})

    def told() -> dict[str, str]:
        result = collect(queries, out, "--pool", str(pool))
        assert result.exit_code == 0, result.output
        return dict(read_outcomes(out)[0].outputs)

    first = told()
    assert first["arithmetic"] == "58" != first["text"]
    shutil.rmtree(pool / "text")
    shutil.copytree(pool / "arithmetic", pool / "text")
    assert told() == {"arithmetic": "58", "text": "58"}


def test_what_a_grader_said_is_kept_whatever_others_could_not_say(tmp_path: Path) -> None:
    """Nor does another weight, or one grader more, ask it again."""
    program = tmp_path / "grade.sh"
    program.write_text(f"#!/bin/sh\necho asked >> {tmp_path}/log\necho '{{\"gamma\": 0.5}}'\n")
    program.chmod(0o755)
    queries, out = questions_at(tmp_path, {"query": "no reference"}), tmp_path / "o.jsonl"
    words = ("--pool", str(pool_at(tmp_path)), "--models", "gamma", "--grade")
    for graders in (("exact", f"command:{program}"), (f"2*command:{program}", "contains")):
        result = collect(queries, out, *words, graders[0], "--grade", graders[1])
        assert result.exit_code == 0, result.output
    assert "not graded by contains: 1" in result.stderr
    assert read_outcomes(out)[0].scores == {"gamma": 0.5}
    assert (tmp_path / "log").read_text() == "asked\n"


def test_a_program_that_was_changed_is_asked_again(tmp_path: Path) -> None:
    """The same command, and other words in the file that it runs."""
    program, out, pool = tmp_path / "grade.sh", tmp_path / "o.jsonl", pool_at(tmp_path)
    queries = questions_at(tmp_path, {"query": "no reference"})
    for score in (0.25, 0.75):
        program.write_text(f"echo '{{\"gamma\": {score}}}'\n")
        words = ("--pool", str(pool), "--models", "gamma", "--grade", f"command:sh {program}")
        result = collect(queries, out, *words)
        assert result.exit_code == 0, result.output
        assert read_outcomes(out)[0].scores == {"gamma": score}


@pytest.mark.parametrize("kind", ["similarity", "reward"])
def test_a_network_that_was_changed_in_place_grades_again(tmp_path: Path, kind: str) -> None:
    """The folder has its name; another network stands in it."""
    queries = questions_at(tmp_path, {"query": "why", "reference": "yes no"})
    out, pool, folder = tmp_path / "o.jsonl", pool_at(tmp_path), tmp_path / "network"
    words = ("--pool", str(pool), "--models", "alpha", "--grade", f"{kind}:{folder}")
    scores = []
    for seed in (0, 0, 1):
        shutil.rmtree(folder, ignore_errors=True)
        labels = 1 if kind == "reward" else None
        save_bert(folder, ["yes", "no", "4", "why"], labels=labels, seed=seed)
        result = collect(queries, out, *words)
        assert result.exit_code == 0, result.output
        scores.append(read_outcomes(out)[0].scores["alpha"])
    assert scores[0] == scores[1] != scores[2]


def test_what_is_wrong_with_a_line_or_a_model_is_named_and_counted(tmp_path: Path) -> None:
    """Bad lines, answers that failed and questions nobody can grade do not end the run."""
    queries = questions_at(
        tmp_path,
        "{",
        {"query": "a", "messages": [{"role": "user", "content": "b"}]},
        {"query": "right?", "reference": "4"},
        {"query": "no reference"},
        {"query": "x", "colour": "red"},
    )
    pool = pool_at(tmp_path, two={"fail_after_tokens": 0})
    out = tmp_path / "outcomes.jsonl"
    result = collect(queries, out, "--pool", str(pool))
    assert result.exit_code == 0, result.output
    [outcome] = read_outcomes(out)
    assert outcome.scores == {"alpha": 1, "beta": 0}
    assert "bad lines: 3" in result.stderr
    assert "line 1: " in result.stderr and "colour: unknown key" in result.stderr
    assert "no answer of gamma: 2" in result.stderr
    assert "not graded at all: 1" in result.stderr


def test_a_line_in_another_encoding_is_named_and_the_others_are_asked(tmp_path: Path) -> None:
    """So are lines that a join has put a byte-order mark before; errors show no whole documents."""
    queries, out = tmp_path / "questions.jsonl", tmp_path / "outcomes.jsonl"
    queries.write_bytes(
        b'\xef\xbb\xbf{"query": "2 + 2?", "reference": 4}\r\n'
        b'{"query": "caf\xe9", "reference": "4"}\n'
        b'\xef\xbb\xbf{"query": "again?", "reference": "4"}\n'
        b'{"query": " "}\n{"query": "' + b"x" * 100_000
    )
    result = collect(queries, out, "--pool", str(pool_at(tmp_path)))
    assert result.exit_code == 0, result.output
    assert [outcome.query for outcome in read_outcomes(out)] == ["2 + 2?", "again?"]
    told = result.stderr.replace("\n", "")
    assert "line 2: it is not UTF-8 text" in told and "0xe9" in told
    assert "line 4: the line: nothing is asked, got {'query': ' '}" in told
    assert "line 5: the line: Invalid JSON" in told and len(told) < 2000


def test_a_file_of_bad_lines_alone_says_what_is_wrong_with_them(tmp_path: Path) -> None:
    """A refusal names the first."""
    queries = questions_at(tmp_path, {"question": "2 + 2?"})
    result = collect(queries, tmp_path / "o.jsonl", "--pool", str(pool_at(tmp_path)))
    assert result.exit_code == 2
    assert "no question that can be asked: " in result.stderr
    assert "line 1: question: unknown key" in result.stderr


def test_a_reference_that_is_no_text_stands_for_its_json(tmp_path: Path) -> None:
    """Numbers and objects are right answers, too."""
    queries = questions_at(
        tmp_path, {"query": "2 + 2?", "reference": 4}, {"query": "?", "reference": [{"a": 1}, 4.0]}
    )
    out = tmp_path / "o.jsonl"
    words = ("--pool", str(pool_at(tmp_path)), "--models", "alpha , alpha", "--grade", "json")
    assert collect(queries, out, *words).exit_code == 0
    assert [one.answer for one in read_outcomes(out)] == ["4", '{"a": 1}']
    assert [one.scores for one in read_outcomes(out)] == [{"alpha": 1}] * 2


def test_a_question_that_is_too_long_costs_the_others_nothing(tmp_path: Path) -> None:
    """A refusal of the prompt is none of what else is asked for: log-probabilities are kept."""
    queries = questions_at(
        tmp_path,
        {"query": "long " * 20_000, "reference": "4"},
        *({"query": f"q{n}", "reference": "4"} for n in range(2)),
    )
    out = tmp_path / "o.jsonl"
    result = collect(queries, out, "--pool", str(pool_at(tmp_path)), "--at-once", "1")
    assert result.exit_code == 0, result.output
    assert [set(one.logprobs) for one in read_outcomes(out)] == [{"alpha", "beta", "gamma"}] * 2


def test_samples_are_outcomes_of_their_own(tmp_path: Path) -> None:
    """Several samples draw several answers; the fake plays its script in turn."""
    pool = pool_at(tmp_path, two={"answers": ["4", "5"]})
    queries, out = questions_at(tmp_path, {"query": "q", "reference": "4"}), tmp_path / "o.jsonl"
    result = collect(queries, out, "--pool", str(pool), "--models", "gamma", "--samples", "2")
    assert result.exit_code == 0, result.output
    found = read_outcomes(out)
    assert [outcome.id for outcome in found] == ["1/0", "1/1"]
    assert sorted(outcome.scores["gamma"] for outcome in found) == [0, 1]


def test_a_running_server_is_asked_as_a_client_would(
    serve: Callable[..., Any], tmp_path: Path
) -> None:
    """Over HTTP, a conversation as it is; a model of the server may be the judge."""
    server = serve(
        engines=[
            {"name": "one", "kind": "fake", "options": {"models": {"beta": {"answers": ["9"]}}}},
            {"name": "two", "kind": "fake", "options": {}},
        ]
    )
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    last = {"role": "user", "content": [{"type": "text", "text": "and?"}]}
    queries = questions_at(tmp_path, {"messages": [*said, last]})
    out = tmp_path / "o.jsonl"
    result = collect(
        queries, out, "--server", server.url, "--models", "alpha", "--grade", "judge:beta"
    )
    assert result.exit_code == 0, result.output
    [outcome] = read_outcomes(out)
    assert outcome.query == "and?" and outcome.outputs == {"alpha": "and?"}
    assert outcome.scores["alpha"] == pytest.approx(8 / 9)


class Odd(BaseHTTPRequestHandler):
    """A server whose model ends in half a character, and once costs less than nothing."""

    def do_GET(self) -> None:
        """List the model."""
        self.say({"data": [{"id": "odd"}]})

    def do_POST(self) -> None:
        """Answer what was asked."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        asked = body["messages"][-1]["content"]
        cost = {"usd": -1.0 if asked == "free?" else 1.0}
        message = {"role": "assistant", "content": f"{asked} \ud83d"}
        self.say({"choices": [{"message": message}], "shoal": {"cost": cost}})

    def say(self, content: object, status: int = 200, **headers: str) -> None:
        """Send JSON."""
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Be silent."""


class Strict(Odd):
    """A server that takes no fields but OpenAI's, is busy once, and tells impossible numbers."""

    busy = True

    def do_POST(self) -> None:
        """Refuse what it does not know; say when to come back."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if "shoal" in body:
            self.say({"error": {"message": "extra fields"}}, status=422)
        elif Strict.busy:
            Strict.busy = False
            self.say({}, status=429, retry_after="1")
        else:
            seen = {"content": [{"logprob": float("-inf")}]}
            usage = {"prompt_tokens": 2**62, "completion_tokens": "many"}
            told = {"message": {"content": "4"}, "logprobs": seen}
            self.say({"choices": [told], "usage": usage})


def test_a_server_is_asked_as_it_wants_to_be(tmp_path: Path) -> None:
    """Without what it refuses, by whatever status, and not before the time that it names."""
    queries = questions_at(tmp_path, {"query": "2 + 2?", "reference": "4"})
    out = tmp_path / "o.jsonl"
    start_s = time.monotonic()
    with ThreadingHTTPServer(("127.0.0.1", 0), Strict) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        result = collect(queries, out, "--server", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert result.exit_code == 0, result.output
    [outcome] = read_outcomes(out)
    assert outcome.scores == {"odd": 1} and not outcome.logprobs
    assert outcome.prompt_tokens is None and not outcome.output_tokens
    assert time.monotonic() - start_s >= 1


def test_a_servers_odd_answers_do_not_end_the_run(tmp_path: Path) -> None:
    """Half a character is replaced; an answer that outcomes cannot hold is named and counted."""
    queries = questions_at(
        tmp_path, {"query": "free?", "reference": "x"}, {"query": "dear?", "reference": "dear? ?"}
    )
    out = tmp_path / "o.jsonl"
    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        result = collect(queries, out, "--server", f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert result.exit_code == 0, result.output
    [outcome] = read_outcomes(out)
    assert outcome.outputs == {"odd": "dear? ?"} and outcome.costs == {"odd": 1.0}
    assert "not usable: 1" in result.stderr and "question 1: costs.odd" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "either --pool or --server"),
        (("--pool", "nowhere"), "no pool file"),
        (("--pool", "POOL", "--models", "delta"), "'delta' is unknown; it has alpha, beta, gamma"),
        (("--pool", "POOL", "--grade", "guess"), "'guess' is unknown"),
        (("--pool", "POOL", "--grade", "judge:delta"), "'delta' is unknown; there are "),
        (("--pool", "POOL", "--grade", "loss"), "alpha has no folder of weights"),
        (("--server", "http://127.0.0.1:9"), "lists no models"),
        (("--server", "http://[::1"), "is no server's address"),
        (("--pool", "POOL", "--out", "."), "--out: . is a folder"),
    ],
)
def test_what_cannot_start_is_refused_in_a_sentence(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    """Status 2 and the reason, before anything is asked."""
    pool = str(pool_at(tmp_path))
    queries = questions_at(tmp_path, {"query": "q", "reference": "4"})
    result = collect(queries, tmp_path / "o.jsonl", *(pool if x == "POOL" else x for x in options))
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize("option", ["--queries", "--pool"])
def test_what_is_read_is_not_written_over(tmp_path: Path, option: str) -> None:
    """Answers in the place of the questions would have lost their references."""
    read = {"--queries": questions_at(tmp_path, {"query": "2 + 2?", "reference": "4"}),
            "--pool": pool_at(tmp_path)}  # fmt: skip
    before = read[option].read_text()
    (tmp_path / "link").symlink_to(read[option])
    for out in (read[option], tmp_path / "link"):
        result = collect(read["--queries"], out, "--pool", str(tmp_path))
        assert result.exit_code == 2
        assert f"--out: {out} is what {option} names" in result.stderr
    assert read[option].read_text() == before


def test_a_folder_that_takes_nothing_is_named_without_pythons_numbers(tmp_path: Path) -> None:
    """Whatever the system says of it."""
    queries = questions_at(tmp_path, {"query": "2 + 2?", "reference": "4"})
    (tmp_path / "o.jsonl.journal").mkdir()
    result = collect(queries, tmp_path / "o.jsonl", "--pool", str(pool_at(tmp_path)))
    assert result.exit_code == 2
    told = f"shoal outcomes collect: {tmp_path}/o.jsonl.journal: Is a directory"
    assert result.stderr.splitlines()[-1] == told
