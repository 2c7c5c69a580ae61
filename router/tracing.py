"""A request as OpenTelemetry spans: one for the request, one per stage of its plan that ran.

Off unless configured; OpenTelemetry is an extra. Spans are made when the request is over, from what
is known of it anyway, so that a request pays nothing while it is served. Names follow the GenAI
semantic conventions; what they have no name for starts with "shoal.". No span holds a prompt or an
answer.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from policies.plan import Answer, Cascade, Plan
from router.config import TracingConfig

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

    from router.exchange import Choice, Exchange
    from router.executor.trace import Run
    from router.record import RequestRecord

_PROVIDER = "shoal"
_SERVER_ERROR = 500
_FAILED = ("failed", "timeout")


class TracingUnavailable(ValueError):
    """Tracing was asked for, and its packages are missing."""


def open_tracer(config: TracingConfig) -> RequestTracer:
    """Return what sends the traces of requests to the configured collector, in the background.

    Raises `TracingUnavailable` where the extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio  # noqa: PLC0415
    except ImportError:
        raise TracingUnavailable(
            "tracing: it needs OpenTelemetry: pip install 'shoal[tracing]'"
        ) from None
    provider: TracerProvider = TracerProvider(
        resource=Resource.create(
            {"service.name": config.service_name, "service.version": version("shoal")}
        ),
        sampler=ParentBasedTraceIdRatio(config.sample_ratio),
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=config.endpoint)))
    return RequestTracer(provider)


class RequestTracer:
    """Makes the spans of requests that ended (a `Watcher`); `provider` samples and exports."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace  # noqa: PLC0415 - an extra
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        self._provider = provider
        self._tracer = provider.get_tracer("shoal")
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()

    def ended(self, exchange: Exchange, record: RequestRecord) -> None:
        """Make the spans of one request."""
        clock = _Clock(exchange)
        operation = "chat" if "chat" in record.endpoint else "text_completion"
        root = self._tracer.start_span(
            f"{operation} {record.model}",
            context=self._parent(exchange),
            kind=self._trace.SpanKind.SERVER,
            start_time=clock.ns(exchange.started_s),
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": _PROVIDER,
                **_present(_request(exchange)),
                **record.span_attributes(),
            },
        )
        if root.is_recording():
            if record.status >= _SERVER_ERROR:
                self._fail(root, record.error)
            for choice in exchange.choices:
                self._stages(root, choice, operation, clock)
        root.end(clock.ns(exchange.ended_s))

    def close(self) -> None:
        """Export what is left, and stop."""
        self._provider.shutdown()

    def _parent(self, exchange: Exchange) -> Context | None:
        if exchange.traceparent is None:
            return None
        return self._propagator.extract({"traceparent": exchange.traceparent})

    def _stages(self, root: Span, choice: Choice, operation: str, clock: _Clock) -> None:
        """Make a span per node of the plan that ran, below its parent's; parents come first."""
        spans: dict[str, Span] = {}
        for path, run in choice.trace.runs.items():
            parent = spans.get(path.rpartition(".")[0], root) if path else root
            span = spans[path] = self._tracer.start_span(
                f"{operation} {'+'.join(run.plan.members)}"
                if isinstance(run.plan, Answer)
                else _combinator(run.plan),
                context=self._trace.set_span_in_context(parent),
                kind=self._trace.SpanKind.INTERNAL,
                start_time=clock.ns(run.started_s),
                attributes=_present(_stage(run, operation)),
            )
            if run.outcome in _FAILED:
                self._fail(span, run.outcome)
        for path, run in choice.trace.runs.items():
            spans[path].end(clock.ns(run.ended_s))

    def _fail(self, span: Span, what: str | None) -> None:
        span.set_status(self._trace.StatusCode.ERROR, what)


class _Clock:
    """Turns a request's seconds of `time.perf_counter` into Unix nanoseconds."""

    def __init__(self, exchange: Exchange) -> None:
        assert exchange.ended_s is not None
        self._origin_s = exchange.record.time_s - exchange.started_s
        self._end_s = exchange.ended_s

    def ns(self, at_s: float | None) -> int:
        """Return the time of `at_s`; None is the request's end."""
        return int((self._origin_s + (self._end_s if at_s is None else at_s)) * 1e9)


def _request(exchange: Exchange) -> dict[str, Any]:
    """Return what the record does not know of what was asked for."""
    ask = exchange.ask
    if ask is None:
        return {}
    return {
        "gen_ai.request.max_tokens": ask.max_tokens,
        "gen_ai.request.temperature": ask.sampling.temperature,
        "gen_ai.request.top_p": ask.sampling.top_p,
        "gen_ai.request.seed": ask.sampling.seed,
        "gen_ai.request.choice.count": ask.n if ask.n > 1 else None,
    }


def _stage(run: Run, operation: str) -> dict[str, Any]:
    shared = {
        "shoal.plan.path": run.path,
        "shoal.plan.outcome": run.outcome,
        "shoal.plan.score": run.score,
        "error.type": run.outcome if run.outcome in _FAILED else None,
    }
    if not isinstance(run.plan, Answer):
        return {"shoal.plan.combinator": _combinator(run.plan), **shared}
    return {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": _PROVIDER,
        "gen_ai.request.model": "+".join(run.plan.members),
        "gen_ai.usage.input_tokens": run.prompt_tokens,
        "gen_ai.usage.output_tokens": run.output_tokens,
        "shoal.engine": run.engine,
        "shoal.members": list(run.plan.members),
        **shared,
    }


def _combinator(plan: Plan) -> str:
    return "cascade" if isinstance(plan, Cascade) else "best"


def _present(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}
