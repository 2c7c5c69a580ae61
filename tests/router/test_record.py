"""One record: a field of it stands in the ledger, in exports, in the log and in the trace."""

from __future__ import annotations

import io
import itertools
import json
import logging
import time
from dataclasses import Field, asdict, fields
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from models.engines.base import SamplingOptions
from policies.base import Query
from policies.footprint import Cost, Rates
from policies.plan import Answer, Cascade
from router.access.keys import Key
from router.exchange import Choice, Exchange
from router.executor.task import Prompt, Task
from router.executor.trace import Trace
from router.ledger.database import open_database
from router.ledger.export import export
from router.ledger.writer import Ledger
from router.logs import JsonLines, RequestLog
from router.metrics.counting import count_rows
from router.record import MemberTokens, RequestRecord
from router.tracing import RequestTracer
from tests.router.conftest import Running

# Nested facts; of all others the test makes up a value from their type.
NESTED = {
    "answered_by": "code+math",
    "answered_with": {"members": ["code", "math"]},
    "plan": {"answer": {"members": ["code", "math"]}},
    "members": {name: MemberTokens(prompt_tokens=3, output_tokens=4) for name in ("code", "math")},
    "costs": {"math": Cost(usd=0.5, wh=0.25, gco2e=0.125, method="measured:rapl")},
    "scores": {"math": 0.75},
    "stages": ({"path": "", "outcome": "ok", "members": ["code", "math"]},),
    "status": 200,
}
FIELDS = fields(RequestRecord)


def value(number: int, field: Field[Any]) -> Any:
    """Return a value that no other field has."""
    if field.name in NESTED:
        return NESTED[field.name]
    kind = str(field.type).partition(" |")[0]
    made: dict[str, Any] = {"str": f"<{field.name}>", "int": number, "float": number + 0.5}
    return {**made, "bool": True}[kind]


@pytest.fixture
def record() -> RequestRecord:
    """A record of which every field holds something."""
    return RequestRecord(**{f.name: value(i, f) for i, f in enumerate(FIELDS, start=1)})


@pytest.fixture
def exported(record: RequestRecord, tmp_path: Path) -> dict[str, Any]:
    """The record's line in an export of the ledger that kept it."""
    ledger = Ledger(
        open_database(f"sqlite:///{tmp_path / 'shoal.db'}"),
        count=count_rows,
        logger=logging.getLogger("test.ledger"),
    )
    ledger.record(record)
    ledger.stop()
    database = open_database(f"sqlite:///{tmp_path / 'shoal.db'}")
    assert export(database, tmp_path / "rows.jsonl", format="jsonl") == 1
    database.dispose()
    line: dict[str, Any] = json.loads((tmp_path / "rows.jsonl").read_text())
    return line


def test_every_field_is_in_ledger_and_export(
    record: RequestRecord, exported: dict[str, Any]
) -> None:
    """A row that went through the database and out again holds every field as it was."""
    assert exported == json.loads(json.dumps(asdict(record)))


def test_every_field_that_is_to_be_shown_is(record: RequestRecord) -> None:
    """The log's line and the span hold each field whose metadata says so, and no other's value."""
    written, exporter, provider = io.StringIO(), InMemorySpanExporter(), TracerProvider()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JsonLines())
    logger = logging.Logger("shoal.requests")
    logger.addHandler(handler)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    exchange = Exchange(record=record, started_s=1.0, ended_s=2.0)
    for watcher in (RequestLog(logger), RequestTracer(provider)):
        watcher.ended(exchange, record)
    line = json.loads(written.getvalue())
    [span] = exporter.get_finished_spans()
    told = dict(span.attributes or {})
    shown = {"arm": "<experiment>/<arm>", "answered_by": ["code", "math"]}
    for field in FIELDS:
        want = getattr(record, field.name)
        name = "members" if field.name == "answered_by" else field.name
        if field.metadata.get("log"):
            assert line.pop(name) == shown.get(field.name, want), field.name
        if field.metadata.get("span"):
            attribute = told.pop(field.metadata["span"])
            assert attribute == (shown[field.name] if field.name == "arm" else want), field.name
    assert set(line) == {"time", "level", "logger", "message"}
    assert set(told) == {"gen_ai.operation.name", "gen_ai.provider.name"}
    assert "<query_text>" not in written.getvalue() + span.to_json()
    provider.shutdown()


def test_what_is_unknown_stays_out_of_the_span() -> None:
    """Empty facts are no attributes; an answer that did not stream has no first chunk."""
    record = RequestRecord(request_id="r", time_s=1.0, endpoint="e", status=200, ttft_s=0.5)
    assert "gen_ai.response.time_to_first_chunk" not in record.span_attributes()
    assert {"gen_ai.request.model", "error.type", "shoal.arm"}.isdisjoint(record.span_attributes())
    assert record.log_fields()["members"] == []
    record.model = "x" * 999
    assert len(record.log_fields()["model"]) == 200


def test_whose_turn_it_is() -> None:
    """A key's, else that of where it comes from; whom a request names adds no turn of its own."""

    def of(headers: dict[str, str], address: str) -> Exchange:
        return Exchange.begin(id_prefix="", endpoint="e", headers=headers, address=address)

    ann, bob = (of({"x-shoal-user": name}, "192.0.2.1") for name in ("ann", "bob"))
    assert ann.client_id == bob.client_id
    assert of({}, "192.0.2.1").client_id != of({}, "192.0.2.2").client_id
    keyed = of({"x-shoal-user": "ann"}, "192.0.2.1")
    keyed.key = Key(id="key_a", name="app", prefix="sk")
    assert keyed.client_id == "key_a"
    keyed.offline = True
    assert keyed.client_id == "offline"


def test_a_request_waits_until_its_first_engine_is_asked() -> None:
    """`queue_s` ends where the first of all answers begins; without one there was no wait."""
    exchange = Exchange.begin(id_prefix="", endpoint="chat.completions", headers={})
    exchange.started_s, exchange.ended_s = 10.0, 19.0
    assert exchange.complete({}).queue_s is None
    plan = Cascade(
        stages=(Answer(members=("small",)), Answer(members=("large",))),
        scorer="logprob",
        thresholds=(0.5,),
    )
    query = Query(text="?")
    task = Task(
        request_id="r",
        query=query,
        prompt=Prompt(text="?"),
        sampling=SamplingOptions(),
        max_tokens=1,
        stream=False,
    )
    ticks = iter((10.5, 11.25, 14.0, 12.0))
    traces = [Trace(clock=ticks.__next__) for _ in range(2)]
    traces[0].begin("", plan)  # a cascade itself asks no engine
    traces[0].begin("0", plan.stages[0])
    traces[0].begin("1", plan.stages[1])
    traces[1].begin("", plan.stages[0])
    exchange.choices = tuple(Choice(plan=plan, task=task, trace=trace) for trace in traces)
    rates = {
        name: Rates(usd_per_input_token=0, usd_per_output_token=0) for name in ("small", "large")
    }
    assert exchange.complete(rates).queue_s == 1.25


def test_a_system_clock_that_jumps_changes_no_duration(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour or a day ahead and back at every look: deadlines hold, and latencies are real."""
    real, jumps_s = time.time, itertools.cycle((3600.0, -7200.0, 86400.0))
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps_s))
    body = {"model": "alpha", "messages": [{"role": "user", "content": "hello"}]}
    began_s = time.monotonic()
    answer = server.http.post(
        "/v1/chat/completions", json=body, headers={"x-shoal-timeout-s": "60"}
    )
    record = server.last_record()
    assert answer.status_code == 200
    assert record.ttft_s is not None
    assert 0 < record.ttft_s <= record.latency_s <= time.monotonic() - began_s
