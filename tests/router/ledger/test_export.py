"""Export, retention, report and their commands."""

from __future__ import annotations

import csv
import json
import time
import tracemalloc
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from policies.errors import PolicyError
from policies.routing.router import load_router
from router.cli.main import app
from router.ledger.database import Database, open_database
from router.ledger.export import export, plot, report_lines
from router.ledger.feedback import Feedback, add_feedback, rated_requests
from router.ledger.queries import Spend, requests, stream
from router.ledger.schema import REQUESTS
from router.ledger.writer import Ledger, prune
from router.record import MemberTokens
from tests.router.ledger.records import record

NewLedger = Callable[..., Ledger]


def _fill(ledger: Ledger, count: int) -> None:
    for number in range(count):
        ledger.record(record(number, query_text='a "quoted",\nline' if number == 1 else None))
    ledger.stop()


def test_every_format_holds_every_row(
    database: Database, new_ledger: NewLedger, tmp_path: Path
) -> None:
    """JSON Lines, CSV and Parquet hold the same rows, in order of time, nested data included."""
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    _fill(new_ledger(), 25)
    paths = {name: tmp_path / f"rows.{name}" for name in ("jsonl", "csv", "parquet")}
    for name, path in paths.items():
        assert export(database, path, format=name) == 25
    expected = list(requests(database))
    assert [json.loads(line) for line in paths["jsonl"].read_text().splitlines()] == expected
    arrow = pq.read_table(paths["parquet"]).to_pylist()
    with paths["csv"].open(newline="") as file:
        text = list(csv.DictReader(file))
    for want, from_arrow, from_csv in zip(expected, arrow, text, strict=True):
        assert from_arrow["usd"] == float(from_csv["usd"]) == want["usd"]
        assert json.loads(from_arrow["members"]) == want["members"]
        assert json.loads(from_csv["stages"]) == want["stages"]
        assert (from_csv["query_text"] or None) == from_arrow["query_text"] == want["query_text"]


def test_a_router_learns_from_feedback(
    database: Database, ledger_url: str, new_ledger: NewLedger, tmp_path: Path
) -> None:
    """Scored answers, exported or straight from the ledger, train a router with other outcomes."""
    ledger = new_ledger()
    for number in range(30):
        members = {("math", "code")[number % 2]: MemberTokens(prompt_tokens=3, output_tokens=4)}
        ledger.record(record(number, members=members, query_text=f"question {number}"))
    ledger.stop()
    for number in range(24):
        add_feedback(database, Feedback(request_id=f"req-{number}", time_s=1, score=number % 3 / 2))
    feedback, known, out = (tmp_path / name for name in ("feedback.jsonl", "known.jsonl", "r.npz"))
    assert export(database, feedback, format="outcomes") == 24
    known.write_text('{"query": "2+2?", "scores": {"math": 1, "code": 0}}\n')
    hashes = set()
    for source in (["--also", str(feedback)], ["--feedback", ledger_url]):
        arguments = ["router", str(known), *source, "--out", str(out)]
        result = CliRunner().invoke(app, ["train", *arguments])
        assert result.exit_code == 0, result.output
        trained = load_router(out)
        assert trained.facts["num_queries"] == 25
        assert trained.output_tokens_M.tolist() == [4.0, 4.0]
        hashes.add(trained.facts["data_sha256"])
    assert len(hashes) == 1
    arguments = ["router", str(known), "--feedback", "sqlite:///nowhere.db", "--out", str(out)]
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 2
    assert "there is no ledger at" in result.output


def test_an_interrupted_export_leaves_the_old_file(
    database: Database, new_ledger: NewLedger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure half-way keeps the file that was there and leaves no temporary one."""
    _fill(new_ledger(), 3)
    target = tmp_path / "rows.jsonl"
    target.write_text("old")

    def broken(*args: object, **kwargs: object) -> object:
        with closing(requests(database)) as rows:
            yield next(rows)
        raise OSError("disk full")

    monkeypatch.setattr("router.ledger.export.requests", broken)
    with pytest.raises(OSError, match="disk full"):
        export(database, target, format="jsonl")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(PolicyError, match="no folder"):
        export(database, tmp_path / "missing" / "x.csv", format="csv")


def test_rows_are_not_all_held_in_memory(database: Database, new_ledger: NewLedger) -> None:
    """Reading 400 rows of 50 kB by tens needs far less memory than they are."""
    ledger = new_ledger()
    for number in range(400):
        ledger.record(record(number, answer_text="x" * 50_000))
    ledger.stop()
    tracemalloc.start()
    num_bytes = sum(
        len(row["answer_text"]) for row in stream(database, sa.select(REQUESTS), rows_per_fetch=10)
    )
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_bytes == 20_000_000
    assert peak_bytes < 5_000_000


def test_prune_removes_old_rows_and_their_feedback(
    database: Database, new_ledger: NewLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows before the given time go, in several transactions; the rest and its feedback stay."""
    monkeypatch.setattr("router.ledger.writer._PRUNED_PER_TRANSACTION", 4)
    _fill(new_ledger(), 20)
    for number in (2, 15):
        add_feedback(database, Feedback(request_id=f"req-{number}", time_s=1, score=1.0))
    assert prune(database, before_s=1_800_000_010.0) == 10
    assert [row["request_id"] for row in requests(database)] == [f"req-{i}" for i in range(10, 20)]
    assert [o.row["request_id"] for o in rated_requests(database, only_with_feedback=True)] == [
        "req-15"
    ]
    assert prune(database, before_s=1_800_000_010.0) == 0


def test_report_table_and_plot(tmp_path: Path) -> None:
    """The table has a line per group and a total; the plot is a PNG, also for many series."""

    def spent(*group: str | int) -> Spend:
        tokens = {"prompt_tokens": 1, "output_tokens": 2}
        counts = {"num_requests": 5, "num_answered": 4, "num_failed": 1}
        return Spend(group=group, usd=0.005, wh=1, gco2e=0.4, latency_s=1.0, **counts, **tokens)

    lines = report_lines(["model"], [spent(f"m{number}") for number in range(12)])
    assert lines[0][:3] == ("model", "requests", "answered")
    assert len(lines) == 1 + 12 + 1
    assert " ".join(lines[-1]) == "total 60 48 12 12 24 0.06 12 4.8 0.200"
    rows = [spent(day * 86400, f"m{number}") for day in (20_000, 20_050) for number in range(12)]
    plot(rows, tmp_path / "p.png", unit="usd", series="model")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert [line[0] for line in report_lines(["day"], [])] == ["day"]
    plot([], tmp_path / "empty.png", unit="tokens", series="model")


def test_commands_on_a_ledger(
    database: Database, new_ledger: NewLedger, ledger_url: str, tmp_path: Path
) -> None:
    """Export, prune and report work from the command line, by age and by date."""
    ledger = new_ledger()
    now_s = time.time()
    ledger.record(record(1, time_s=now_s - 40 * 86400))
    ledger.record(record(2, time_s=now_s - 3600))
    ledger.stop()
    env = {"SHOAL_LEDGER": ledger_url}

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, arguments, env=env)
        assert result.exit_code == 0, result.output
        return result.output

    target = tmp_path / "rows.csv"
    assert run("ledger", "export", str(target), "--since", "2d").startswith("1 rows")
    assert run("ledger", "export", str(target), "--until", "2020-01-01").startswith("0 rows")
    image = tmp_path / "spend.png"
    output = run("report", "--by", "day,key", "--plot", str(image), "--unit", "wh")
    assert "total" in output and image.exists()
    assert run("ledger", "prune", "--older-than", "30d").startswith("1 rows deleted")
    assert [row["request_id"] for row in requests(database)] == ["req-2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ledger", "export", "rows.txt"), "give --format"),
        (("ledger", "export", "rows.csv", "--since", "yesterday"), "neither a date"),
        (("ledger", "prune", "--older-than", "old"), "nor an age"),
        (("report", "--by", "day,colour"), "'colour' is unknown"),
        (("report", "--ledger", "sqlite:////nowhere/x.db"), "no ledger at /nowhere/x.db"),
        (("report", "--plot", "no/x.png"), "Error: --plot: there is no folder no"),
        (("ledger", "export", "/proc/x.csv"), "Error: /proc/x.csv cannot be written"),
        (("keys", "create", "--name", "a", "--cap", "usd_per_year=1"), "usd_per_year"),
        (("keys", "create", "--name", "a", "--cap", "usd_per_day"), "NAME=NUMBER"),
        (("keys", "revoke", "nobody"), "no key 'nobody'"),
    ],
)
def test_commands_refuse_what_makes_no_sense(
    tmp_path: Path, arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the user got wrong is one line on stderr and exit code 1, not a traceback."""
    monkeypatch.chdir(tmp_path)
    open_database(f"sqlite:///{tmp_path / 'shoal.db'}").dispose()
    monkeypatch.setenv("SHOAL_LEDGER", f"sqlite:///{tmp_path / 'shoal.db'}")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert message in result.stderr.replace("\n", " ")
