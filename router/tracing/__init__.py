"""OpenTelemetry traces of requests: off unless configured, an extra of its own."""
