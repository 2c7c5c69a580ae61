"""`shoal chat`, `shoal models` and `shoal --version` against a real server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from router.cli.main import app
from tests.router.conftest import Running, running, write_pool

NOBODY = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Serve models that echo, and one that fails in mid-answer."""
    options = {"models": {"alpha": {"fail_after_tokens": 3}}}
    engines = [
        {"name": "one", "kind": "fake", "options": options},
        {"name": "two", "kind": "fake"},
    ]
    with running(tmp_path_factory.mktemp("pool"), engines=engines) as server:
        yield server


def _shoal(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin)


def test_version() -> None:
    """The version is printed, and nothing else."""
    result = _shoal("--version")
    assert result.exit_code == 0
    assert result.stdout.split()[0] == "shoal"


def test_chat_says_the_answer_and_who_gave_it(server: Any) -> None:
    """A prompt is answered on stdout; members and tokens go to stderr."""
    result = _shoal("chat", "--url", server.url, "Grüße")
    assert (result.exit_code, result.stdout) == (0, "Grüße\n")
    assert "[beta, 8 tokens]" in result.stderr


def test_chat_takes_a_model_and_v1_urls(server: Any) -> None:
    """--model picks the model; a base URL as clients write it works too."""
    result = _shoal("chat", "--url", f"{server.url}/v1", "--model", "gamma", "x")
    assert result.stdout == "x\n"
    assert "[gamma, 2 tokens]" in result.stderr


def test_conversation_goes_on_until_the_end_of_input(server: Any) -> None:
    """Without a prompt every line is answered, in one conversation; empty lines are skipped."""
    server.forget()
    result = _shoal("chat", "--url", server.url, stdin="one\n\ntwo\n")
    assert result.exit_code == 0
    assert "one\n" in result.stdout
    assert "two\n" in result.stdout
    # A record follows the answer's last byte.
    server.wait(lambda: len(server.ledger.records) == 2)
    first, second = server.ledger.records
    assert second.prompt_tokens > first.prompt_tokens + len("two")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "--url", NOBODY, "x"], f"no server answers at {NOBODY}"),
        (["models", "--url", NOBODY], f"no server answers at {NOBODY}"),
    ],
)
def test_no_server(arguments: list[str], message: str) -> None:
    """Without a server the command says so in one line, and how to start one."""
    result = _shoal(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "shoal serve" in result.stderr


@pytest.mark.parametrize(
    ("model", "message"),
    [("nobody", "The model 'nobody' does not exist"), ("alpha", "fails after 3 tokens")],
)
def test_refusals_are_passed_on(server: Any, model: str, message: str) -> None:
    """What the server refuses, or fails at in mid-answer, is told without a traceback."""
    result = _shoal("chat", "--url", server.url, "--model", model, "hello")
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_models_of_a_server(server: Any) -> None:
    """The table lists policies with their members and models with their prices."""
    lines = _shoal("models", "--url", server.url).stdout.splitlines()
    assert lines[0].split()[:2] == ["NAME", "KIND"]
    rows = {line.split()[0]: line.split() for line in lines[1:]}
    assert list(rows) == ["auto", "policy/auto", "alpha", "beta", "gamma"]
    assert rows["auto"] == ["auto", "policy", "beta"]
    assert rows["alpha"] == ["alpha", "model", "1", "2", "tests"]


def test_models_of_a_pool(tmp_path: Path) -> None:
    """A pool file is read without a server; a bad one is refused with exit code 2."""
    result = _shoal("models", "--pool", str(write_pool(tmp_path)))
    assert [line.split()[0] for line in result.stdout.splitlines()[1:]] == [
        "alpha",
        "beta",
        "gamma",
    ]
    refused = _shoal("models", "--pool", str(tmp_path / "nowhere"))
    assert refused.exit_code == 2
    assert "there is no pool file" in refused.stderr
