"""Opens the way to an OTLP collector; the only place that needs the extra's packages."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from router.tracing.config import TracingConfig
from router.tracing.tracer import RequestTracer

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider


class TracingUnavailable(ValueError):
    """Tracing was asked for, and its packages are missing."""


def open_tracer(config: TracingConfig) -> RequestTracer:
    """Return what sends the traces of requests to the configured collector, in the background.

    Raises `TracingUnavailable` where the extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,
        )
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
