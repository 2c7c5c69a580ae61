"""The `tracing:` section of the server's configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class TracingConfig(BaseModel):
    """Where traces go: an OTLP collector that takes HTTP, such as http://localhost:4318/v1/traces.

    `sample_ratio` of the traces that begin here are kept; one that a client began is kept if the
    client keeps it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    endpoint: str = Field(pattern=r"^https?://")
    service_name: str = "shoal"
    sample_ratio: float = Field(1.0, ge=0, le=1)
