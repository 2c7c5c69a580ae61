"""The `options` of an engine of kind `remote`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.errors import PoolError


class RemoteOptions(BaseModel):
    """Where the server is, how to ask it, and how long to be patient.

    `base_url` ends where `/chat/completions` follows, usually in `/v1`. The key is read at start
    from the environment variable `api_key_env` or the file `api_key_file` (a mounted secret), never
    from this file. `logprobs` false for a server that returns no log-probabilities: its answers
    cannot be judged by a cascade's scorer then. Its completions endpoint tells of at most
    `completion_logprobs` alternatives (vLLM's of 20). Newer hosted models want `max_tokens_field`
    "max_completion_tokens".

    A connection must stand within `connect_timeout_s`, and the server may be silent for at most
    `read_timeout_s`; at most `max_connections` requests run at once. An attempt that failed before
    any text came is repeated up to `max_retries` times, after the time that the server asks for,
    else after `backoff_s`, doubled each time; only if the request's deadline allows. After
    `breaker_failures` failures in a row the server is left alone for `breaker_open_s`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_url: str = Field(pattern=r"^https?://[^\s?#]+$")
    api_key_env: str | None = None
    api_key_file: Path | None = None
    headers: dict[str, str] = Field(default_factory=dict)
    logprobs: bool = True
    completion_logprobs: int = Field(5, ge=0, le=20)
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    connect_timeout_s: float = Field(5, gt=0)
    read_timeout_s: float = Field(60, gt=0)
    max_connections: int = Field(100, ge=1)
    max_retries: int = Field(2, ge=0)
    backoff_s: float = Field(0.5, gt=0)
    breaker_failures: int = Field(5, ge=1)
    breaker_open_s: float = Field(30, gt=0)

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        if self.api_key_env is not None and self.api_key_file is not None:
            raise ValueError("give api_key_env or api_key_file, not both")
        for name in self.headers:
            if name.lower() == "authorization":
                raise ValueError("a key belongs into api_key_env or api_key_file, not into headers")
        return self

    def read_key(self, engine: str) -> str | None:
        """Return the key; None where none is configured. `PoolError` if it isn't there."""
        if self.api_key_env is not None:
            key = os.environ.get(self.api_key_env, "").strip()
            if not key:
                raise PoolError(
                    f"engines.{engine}.options.api_key_env: the environment variable "
                    f"{self.api_key_env} is not set where the engine runs"
                )
            return key
        if self.api_key_file is not None:
            try:
                key = self.api_key_file.read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise PoolError(
                    f"engines.{engine}.options.api_key_file: {self.api_key_file} cannot be read: "
                    f"{type(error).__name__}"
                ) from None
            if not key:
                raise PoolError(
                    f"engines.{engine}.options.api_key_file: {self.api_key_file} is empty"
                )
            return key
        return None
