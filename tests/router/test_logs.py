"""Log lines: one JSON object each, with the request's id, and no text of anybody's."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from router.logs import LogsConfig, set_up_logs
from tests.router.conftest import running

SECRET = "the-prompt-is-secret"


@pytest.fixture
def written() -> io.StringIO:
    """Where lines go."""
    return io.StringIO()


def lines(written: io.StringIO) -> list[dict[str, Any]]:
    """Return the lines as objects."""
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_each_request_leaves_a_line(written: io.StringIO, tmp_path: Path) -> None:
    """What was asked, what ran, what it cost; neither prompt nor answer, whole or streamed."""
    config = LogsConfig(format="json", level="INFO", requests=True)
    set_up_logs(config, written)
    app = {"ledger": {"url": f"sqlite:///{tmp_path}/a.db", "keep_text": True}}
    with running(tmp_path, app={**app, "logs": config.model_dump()}) as server:
        answer = server.chat(SECRET)
        list(server.chat(SECRET, model="auto", stream=True))
        server.post(model="x" * 250)
        server.wait(lambda: written.getvalue().count('"shoal.requests"') >= 3)
    found = [line for line in lines(written) if line["logger"] == "shoal.requests"]
    assert [line["status"] for line in found] == [200, 200, 404]
    assert found[0]["request_id"] == answer.id
    assert found[0]["members"] == ["alpha"]
    assert found[1]["policy"] == "auto"
    assert found[1]["ttft_s"] > 0
    assert found[2]["error"] == "model_not_found"
    assert len(found[2]["model"]) == 200
    assert SECRET not in written.getvalue()


def test_errors_carry_the_request_they_belong_to(written: io.StringIO, tmp_path: Path) -> None:
    """A line that is written while a request is served has its id, and a traceback if there is."""
    set_up_logs(LogsConfig(format="json"), written)
    engines = [
        {"name": "one", "kind": "fake", "options": {"fail_after_tokens": 0}},
        {"name": "two", "kind": "fake", "options": {}},
    ]
    with running(tmp_path, engines=engines) as server:
        assert server.post(messages=[{"role": "user", "content": SECRET}]).status_code == 503
        record = server.last_record()
    [line] = [line for line in lines(written) if line["level"] == "ERROR"]
    assert line["request_id"] == record.request_id
    assert line["logger"] == "router.service"
    assert SECRET not in written.getvalue()


def test_plain_lines_stay_as_they_are(written: io.StringIO) -> None:
    """By default nobody's handlers are touched."""
    before = list(logging.getLogger("router").handlers)
    set_up_logs(LogsConfig(), written)
    assert logging.getLogger("router").handlers == before
    assert logging.getLogger("router").level == logging.WARNING


def test_plain_lines_of_requests(written: io.StringIO) -> None:
    """With `requests` alone, people read a line per request."""
    set_up_logs(LogsConfig(requests=True), written)
    logging.getLogger("shoal.requests").info("%s %d", "/v1/chat/completions", 200)
    assert written.getvalue().endswith("INFO shoal.requests: /v1/chat/completions 200\n")
