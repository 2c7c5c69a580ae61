"""Spans: one per request, one per stage of its plan, nested as the plan is."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from router.config import TracingConfig
from router.tracing import RequestTracer, TracingUnavailable, open_tracer
from tests.router.conftest import Running, running

SECRET = "the-prompt-is-secret"
PLAN = {
    "cascade": {
        "stages": ["alpha", {"answer": {"members": ["alpha", "beta"]}}],
        "thresholds": [0.99],
    }
}


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What every traced server exports to."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr("router.compose.open_tracer", lambda config: RequestTracer(provider))
    return exporter


@pytest.fixture
def server(exporter: InMemorySpanExporter, tmp_path: Path) -> Iterator[Running]:
    """A server with tracing on, of which the engine `two` fails."""
    app = {
        "tracing": {"endpoint": "http://127.0.0.1:1/v1/traces"},
        "ledger": {"url": f"sqlite:///{tmp_path}/a.db"},
    }
    engines = [
        {"name": "one", "kind": "fake", "options": {}},
        {"name": "two", "kind": "fake", "options": {"fail_after_tokens": 0}},
    ]
    with running(tmp_path, app=app, engines=engines) as server:
        yield server


def spans(server: Running, exporter: InMemorySpanExporter, number: int) -> list[ReadableSpan]:
    """Return the `number` spans of the last request, in order of their starts."""
    server.wait(lambda: len(exporter.get_finished_spans()) >= number)
    found = sorted(exporter.get_finished_spans(), key=lambda span: span.start_time or 0)
    assert len(found) == number
    return found


def test_a_cascade_is_a_tree_of_spans(server: Running, exporter: InMemorySpanExporter) -> None:
    """Request, cascade and both stages, with GenAI names, usage, outcome and no text."""
    answer: Any = server.chat(
        SECRET, model="auto", max_tokens=50, temperature=0.5, extra_body={"shoal": {"plan": PLAN}}
    )
    request, cascade, first, second = spans(server, exporter, 4)
    assert request.name == "chat auto"
    assert request.kind is SpanKind.SERVER
    said = dict(request.attributes or {})
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "shoal",
        "gen_ai.request.model": "auto",
        "gen_ai.request.max_tokens": 50,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.response.id": answer.id,
        "gen_ai.usage.input_tokens": answer.usage.prompt_tokens,
        "gen_ai.usage.output_tokens": answer.usage.completion_tokens,
        "http.response.status_code": 200,
    }
    assert said.items() >= expected.items()
    assert said["shoal.cost.usd"] > 0  # type: ignore[operator]
    assert [cascade.name, first.name, second.name] == ["cascade", "chat alpha", "chat alpha+beta"]
    for child, parent in ((cascade, request), (first, cascade), (second, cascade)):
        assert child.parent is not None
        assert child.parent.span_id == parent.context.span_id  # type: ignore[union-attr]
        assert parent.start_time <= child.start_time <= child.end_time <= parent.end_time  # type: ignore[operator]
    assert (first.attributes or {})["shoal.plan.outcome"] in ("rejected", "hopeless")
    assert (second.attributes or {})["shoal.members"] == ("alpha", "beta")
    assert SECRET not in "".join(span.to_json() for span in exporter.get_finished_spans())


def test_failures_are_errors(server: Running, exporter: InMemorySpanExporter) -> None:
    """A failed engine marks its stage and the request; a client's mistake marks neither."""
    assert server.post(model="gamma").status_code == 503
    request, stage = spans(server, exporter, 2)
    assert request.status.status_code is StatusCode.ERROR
    assert (request.attributes or {})["error.type"] == "engine_failed"
    assert stage.status.status_code is StatusCode.ERROR
    exporter.clear()
    assert server.post(model="nobody").status_code == 404
    [request] = spans(server, exporter, 1)
    assert request.status.status_code is StatusCode.UNSET
    assert (request.attributes or {})["error.type"] == "model_not_found"


def test_a_clients_trace_goes_on(server: Running, exporter: InMemorySpanExporter) -> None:
    """The W3C header `traceparent` makes the request part of the client's trace."""
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    server.http.headers["traceparent"] = f"00-{trace}-{parent}-01"
    assert server.post(stream=True).status_code == 200
    request, _ = spans(server, exporter, 2)
    assert f"{request.context.trace_id:032x}" == trace  # type: ignore[union-attr]
    assert request.parent is not None
    assert f"{request.parent.span_id:016x}" == parent
    assert (request.attributes or {})["gen_ai.response.time_to_first_chunk"] > 0  # type: ignore[operator]


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the packages, asking for traces fails at once, and says what to install."""
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TracingUnavailable, match=r"pip install 'shoal\[tracing\]'"):
        open_tracer(TracingConfig(endpoint="http://localhost:4318/v1/traces"))


def test_the_provider_samples_and_names_the_service() -> None:
    """With a ratio of zero nothing is recorded; the service has its configured name."""
    tracer = open_tracer(
        TracingConfig(endpoint="http://127.0.0.1:1/v1/traces", service_name="x", sample_ratio=0)
    )
    span = tracer._tracer.start_span("any")
    assert not span.is_recording()
    assert tracer._provider.resource.attributes["service.name"] == "x"
    tracer.close()


@pytest.mark.parametrize("value", [{"endpoint": "localhost:4317"}, {"sample_ratio": 2}, {"x": 1}])
def test_a_wrong_configuration_is_refused(value: dict[str, Any]) -> None:
    """Addresses without a scheme, impossible ratios and unknown keys are found at the start."""
    with pytest.raises(ValueError, match=next(iter(value))):
        TracingConfig.model_validate({"endpoint": "http://localhost", **value})
