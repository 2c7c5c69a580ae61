"""`shoal train router`, `shoal evaluate router` and `shoal route`, as a user types them."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from policies.outcomes import Outcome, read_outcomes, write_outcomes
from policies.routing.router import load_router
from router.cli.main import app
from router.ledger.database import open_database

MEMBERS = ("adder", "speller")


def _shoal(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _outcomes(num_queries: int, split: str, seed: int) -> list[Outcome]:
    """Return sums that `adder` knows and words that `speller` knows."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num_queries):
        a, b, sums = rng.integers(1000), rng.integers(1000), bool(rng.integers(2))
        query = f"What is {a} plus {b}, then?" if sums else f"Spell number {a} and word {b} aloud"
        scores = dict(zip(MEMBERS, (float(sums), float(not sums)), strict=True))
        rows.append(Outcome(query=query, scores=scores, split=split, tags=("sums", "words")[:1]))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outcomes (seeds 0 and 1), the router that `shoal train router` made, and a pool with it."""
    folder = tmp_path_factory.mktemp("routed")
    rows = [*_outcomes(120, "train", 0), *_outcomes(40, "test", 1)]
    write_outcomes(folder / "outcomes.jsonl", rows)
    result = _shoal(
        *("train", "router", folder / "outcomes.jsonl", "--split", "train", "--bits", 12),
        *("--clusters", 4, "--out", folder / "router.npz"),
    )
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["models"] == list(MEMBERS)
    assert said["num_queries"] == 120
    assert {"ece", "accuracy", "best_single", "oracle"} <= set(said["held_out"])
    assert len(said["data_sha256"]) == 64
    members = [{"name": name, "engine": "fakes"} for name in MEMBERS]
    pool = {
        "name": "two",
        "engines": [{"name": "fakes", "kind": "fake"}],
        "models": members,
        "policies": {
            "auto": {"kind": "learned", "path": "router.npz", "unfamiliar": "speller"},
            "nearest": {"kind": "clusters", "path": "router.npz"},
            "always": {"kind": "fixed", "plan": "adder"},
        },
    }
    (folder / "pool.yaml").write_text(json.dumps(pool))
    return folder


def test_evaluating_compares_with_references(folder: Path) -> None:
    """The table has every reference; the plot is a PNG; the split decides what is measured."""
    plot = folder / "reliability.png"
    result = _shoal(
        *("evaluate", "router", folder / "router.npz", folder / "outcomes.jsonl"),
        *("--split", "test", "--plot", plot),
    )
    assert result.exit_code == 0, result.output
    assert "(40 test queries)" in result.stdout
    for method in ("random", "best single", "Clusters", "Learned", "per-query oracle"):
        assert f"\n| {method} |" in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_evaluating_says_what_training_has_seen(folder: Path) -> None:
    """Training's own queries are refused or called so; `--trained-on` leaves out their repeats."""
    router, file = folder / "router.npz", folder / "outcomes.jsonl"
    refused = _shoal("evaluate", "router", router, file, "--split", "train")
    assert refused.exit_code == 2
    assert "the router was trained on every query that has all scores" in refused.stderr
    again = _shoal("evaluate", "router", router, file, "--split", "train", "--seen")
    assert "(120 test queries; 120 were trained on)" in again.stdout
    known = ("--trained-on", file, "--trained-split", "train")
    every = _shoal("evaluate", "router", router, file, *known)
    assert "(40 test queries; left out: 120 that repeat what was trained on)" in every.stdout
    none = _shoal("evaluate", "router", router, file, "--split", "train", *known)
    assert none.exit_code == 2
    assert none.stderr == refused.stderr
    # Without being told which they were, it knows its own.
    whole = _shoal("evaluate", "router", router, file)
    assert "(40 test queries; left out: 120 that were trained on)" in whole.stdout


@pytest.mark.parametrize("policy", ["auto", "nearest"])
def test_a_route_is_explained(folder: Path, policy: str) -> None:
    """Each member's quality and cost, the nearest cluster, the strongest n-grams; also as JSON."""
    asked = ("route", "What is 12 plus 30, then?", "--pool", folder, "--policy", policy)
    text = _shoal(*asked, "--explain").stdout
    assert text.startswith('plan    {"answer": {"members": ["adder"]')
    for part in ("adder ", "speller ", "nearest cluster", "strongest n-grams", "USD per million"):
        assert part in text
    told = json.loads(_shoal(*asked, "--explain", "--json").stdout)
    assert told["plan"]["answer"]["members"] == ["adder"]
    assert set(told["scores"]) == set(MEMBERS)
    assert [member["model"] for member in told["details"]["members"]] == list(MEMBERS)
    assert set(told["details"]) >= {"nearest_cluster", "strongest_ngrams", "likeness_logit"}
    assert json.loads(_shoal(*asked, "--json").stdout)["details"] == {}


def test_a_policy_without_reasons_to_show_is_routed_too(folder: Path) -> None:
    """A fixed plan has nothing to explain, and says its plan."""
    result = _shoal("route", "anything", "--pool", folder, "--policy", "always", "--explain")
    assert result.exit_code == 0
    assert '"adder"' in result.stdout


@pytest.mark.parametrize("query", ["", "那只鲨鱼会唱歌吗", "x" * 1_000_000])
def test_odd_queries_are_routed_to_the_safe_plan(folder: Path, query: str) -> None:
    """An empty, a foreign and a huge query have a plan, and the reason says why that one."""
    result = _shoal("route", query, "--pool", folder, "--explain")
    assert result.exit_code == 0
    assert '"members": ["speller"]' in result.stdout
    assert "unlike the training queries" in result.stdout


def test_one_command_retrains_on_feedback(folder: Path, tmp_path: Path) -> None:
    """With a ledger nobody has scored the router is that of the outcomes; see also test_export."""
    ledger = f"sqlite:///{tmp_path / 'ledger.db'}"
    open_database(ledger).dispose()
    out = tmp_path / "router.npz"
    result = _shoal(
        *("train", "router", folder / "outcomes.jsonl", "--feedback", ledger, "--bits", 12),
        *("--also", folder / "outcomes.jsonl", "--models", "speller,adder", "--out", out),
    )
    assert result.exit_code == 0, result.output
    assert load_router(out).models == ("speller", "adder")
    assert load_router(out).facts["num_queries"] == 320


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train router {f}/nowhere.jsonl --out {f}/x.npz", "nowhere.jsonl cannot be read"),
        ("train router {f}/outcomes.jsonl --out {f}/no/x.npz", "--out: there is no folder"),
        ("train router {f} --out {f}/x.npz", "is a folder without responses/"),
        ("train router {f}/bad.jsonl --out {f}/x.npz", "bad.jsonl, line 1: scores"),
        ("train router {f}/outcomes.jsonl --out {f}/x.npz --models eve", "'eve' has no scores"),
        ("train router {f}/outcomes.jsonl --out {f}/x.npz --bits 4", "ngrams.bits: 4 is not in"),
        ("train router {f}/outcomes.jsonl --out {f}/x.npz --encoder w2v", "'w2v' is unknown"),
        (
            "train router {f}/outcomes.jsonl --out {f}/x.npz --feedback sqlite:///{f}/no.db",
            "name it with --feedback",
        ),
        (
            "train router {f}/outcomes.jsonl --out {f}/x.npz --encoder neural:package:no-such/x",
            "the distribution 'no-such' is not installed",
        ),
        ("outcomes show {f}/outcomes.jsonl --first 9000", "--first 9000: "),
        ("evaluate router {f}/outcomes.jsonl {f}/outcomes.jsonl", "it is no archive of arrays"),
        ("evaluate router {f}/bad.npz {f}/outcomes.jsonl", "bad.npz is not a router file"),
        (
            "evaluate router {f}/router.npz {f}/outcomes.jsonl --models eve",
            "knows nothing of 'eve'",
        ),
        ("evaluate router {f}/router.npz {f}/outcomes.jsonl --split dev", "split 'dev' is unknown"),
        ("evaluate router {f}/router.npz {f}/outcomes.jsonl --plot {f}", "is a folder, not a file"),
        (
            "evaluate router {f}/router.npz {f}/outcomes.jsonl --protocol folds --seen",
            "--seen: --protocol folds trains anew",
        ),
        (
            "evaluate router {f}/router.npz {f}/outcomes.jsonl --trained-split test",
            "there is no --trained-on",
        ),
        (
            "train cascade {f}/outcomes.jsonl --budget 1 --out {f}/no/x.npz",
            "--out: there is no fol",
        ),
        (
            "train cascade {f}/outcomes.jsonl --budget 1 --out {f}/x.npz --plot {f}/x.foo",
            "x.foo does not end in .png",
        ),
        ("route hello --pool {f} --policy best", "allowed|the pool has auto, nearest, always"),
        ("route hello --pool {f}/nowhere", "there is no pool file"),
        ("route hello --pool {f}/broken", "router.npz is not a router file"),
    ],
)
def test_mistakes_are_one_line_and_status_2(folder: Path, arguments: str, message: str) -> None:
    """The line names the command and what is wrong, and nothing is left behind."""
    (folder / "bad.jsonl").write_text('{"query": "q", "scores": {}}\n')
    (folder / "bad.npz").write_bytes((folder / "router.npz").read_bytes()[:500])
    (folder / "broken").mkdir(exist_ok=True)
    (folder / "broken" / "pool.yaml").write_text((folder / "pool.yaml").read_text())
    (folder / "broken" / "router.npz").write_text("not a router")
    result = _shoal(*(part.format(f=folder) for part in arguments.split()))
    assert result.exit_code == 2, result.output
    assert any(part in result.stderr for part in message.split("|")), result.stderr
    assert result.stderr.startswith(f"shoal {arguments.partition(' {')[0].split(' hello')[0]}: ")
    assert len(result.stderr.splitlines()) == 1
    assert not (folder / "x.npz").exists()


def test_a_protocol_draws_its_diagram_too(folder: Path, tmp_path: Path) -> None:
    """Of what the routers trained anew predicted."""
    plot = tmp_path / "reliability.png"
    result = _shoal(
        *("evaluate", "router", folder / "router.npz", folder / "outcomes.jsonl"),
        *("--protocol", "split", "--plot", plot, "--models", "adder, speller"),
    )
    assert result.exit_code == 0, result.output
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_cascade_is_learned_where_every_model_lacks_some_answer(
    folder: Path, tmp_path: Path
) -> None:
    """What lacks one is left out and counted; a model that few were put to is no stage at all."""
    answers = {"adder": "thirty", "speller": "s-h-a-r-k"}
    rows = [
        replace(
            row,
            scores={n: s for n, s in row.scores.items() if at % 5 or n != MEMBERS[at % 2]},
            outputs=answers,
            prompt_tokens=9,
            output_tokens={"adder": 3, "speller": 3 + at % 2},
            costs={"adder": 1e-6, "speller": 3e-6},
        )
        for at, row in enumerate(read_outcomes(folder / "outcomes.jsonl"))
    ]
    rows[1] = replace(rows[1], scores={**rows[1].scores, "rare": 1.0})
    write_outcomes(tmp_path / "outcomes.jsonl", rows)
    result = _shoal(
        *("train", "cascade", tmp_path / "outcomes.jsonl", "--pool", folder, "--budget", "60%"),
        *("--split", "train", "--out", tmp_path / "cascade.npz"),
    )
    assert result.exit_code == 0, result.output
    assert re.search(r"Left out: \d+ of 120 that lack an answer", result.stderr)
    assert "rare" not in result.stdout
    endless = _shoal(
        *("train", "cascade", tmp_path / "outcomes.jsonl", "--pool", folder, "--budget", "inf"),
        *("--split", "train", "--out", tmp_path / "other.npz"),
    )
    assert "--budget 'inf' is neither a percentage" in endless.stderr
    strangers = _shoal(
        *("train", "cascade", tmp_path / "outcomes.jsonl", "--budget", "60%"),
        *("--split", "train", "--out", tmp_path / "other.npz"),
    )
    assert strangers.exit_code == 2
    assert "the pool has none of the outcomes' models, adder, speller" in strangers.stderr
    other_name = _shoal(
        *("train", "cascade", tmp_path / "outcomes.jsonl", "--pool", folder, "--budget", "60%"),
        *("--split", "train", "--out", tmp_path / "cascade.png"),
    )
    assert other_name.exit_code == 2
    assert "--out" in other_name.stderr
    assert "does not end in .npz" in other_name.stderr


def test_a_cascade_of_what_costs_nothing_or_was_not_asked(folder: Path, tmp_path: Path) -> None:
    """Where nothing costs, no share of the dearest is told; of queries put to one model each none
    is learned."""
    rows = [
        replace(row, outputs=dict.fromkeys(row.scores, "4"), costs=dict.fromkeys(row.scores, 0.0))
        for row in read_outcomes(folder / "outcomes.jsonl")
    ]
    file = tmp_path / "outcomes.jsonl"
    options = ("--pool", folder, "--split", "train", "--out", tmp_path / "cascade.npz")
    write_outcomes(file, rows)
    free = _shoal("train", "cascade", file, "--budget", "1", *options)
    assert free.exit_code == 0, free.output
    assert "–" in free.stdout
    turns = (*MEMBERS, "a third")
    some = (
        replace(row, scores={turns[at % 3]: 1.0}, outputs={}, costs={})
        for at, row in enumerate(rows)
    )
    write_outcomes(file, some)
    sparse = _shoal("train", "cascade", file, "--budget", "1", *options)
    assert sparse.exit_code == 2
    assert re.search(r"none of .* answered half of the \d+ queries", sparse.stderr)


def test_no_command_waits_for_what_another_uses() -> None:
    """The command line itself loads nothing heavy: `shoal --help` would wait for it."""
    code = (
        "import sys, router.cli.main\nprint({'numpy', 'pydantic', 'sqlalchemy'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
