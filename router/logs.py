"""What the server writes to its log: lines as people read them, or one JSON object each.

Every line that is written while a request is served carries its id. No line of ours holds a prompt
or an answer.
"""

from __future__ import annotations

import json
import logging
import sys
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, TextIO, TypeAlias

from policies.kinds import Strict
from router.record import RequestRecord

LOGGERS = ("shoal", "router", "models", "policies")
REQUESTS_LOGGER = "shoal.requests"

Level: TypeAlias = Literal["DEBUG", "INFO", "WARNING", "ERROR"]

# The id of the request that the present task serves.
REQUEST_ID: ContextVar[str | None] = ContextVar("shoal_request_id", default=None)


class LogsConfig(Strict):
    """The `logs:` section of the server's configuration.

    `format` "json" writes one object per line to standard error, "plain" leaves Python's own lines.
    `requests` writes a line per request: what was asked for, what ran, what it cost, no text.
    """

    format: Literal["plain", "json"] = "plain"
    level: Level = "WARNING"
    requests: bool = False


def set_up_logs(config: LogsConfig, stream: TextIO | None = None) -> None:
    """Write this process's log as `config` wants it, to `stream` (default: standard error)."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(config.level)
    if config.requests:
        logging.getLogger(REQUESTS_LOGGER).setLevel(logging.INFO)
    if config.format == "plain" and not config.requests:
        return
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines() if config.format == "json" else _PLAIN)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False


_PLAIN = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, logger, message, request id, and `extra` fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of `record`."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields: dict[str, Any] = getattr(record, "shoal", {})
        request_id = fields.get("request_id") or REQUEST_ID.get()
        if request_id is not None:
            line["request_id"] = request_id
        line.update(fields)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str, separators=(",", ":"))


class RequestLog:
    """Writes a line per request (a `Watcher`)."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def ended(self, exchange: object, record: RequestRecord) -> None:  # noqa: ARG002
        """Write what became of the request."""
        self._logger.info(
            "%s %d in %.3f s", record.endpoint, record.status, record.latency_s,
            extra={"shoal": record.log_fields()},
        )  # fmt: skip

    def close(self) -> None:
        """Nothing is held."""
