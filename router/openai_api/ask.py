"""What a request asks for, whichever endpoint it came through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from models.engines.base import SamplingOptions
from policies.footprint import Limits
from router.executor.task import Prompt


class Extension(BaseModel):
    """The body's `shoal` object: what OpenAI's API has no field for.

    `policy` or `plan` (JSON, see `policies.plan`) replace what the `model` stands for. `explain`
    adds the policy's predictions and everything that ran to the response. `session` names a
    conversation. `timeout_s` ends the request; the `max_*` bound its estimated cost, and
    `quality_floor` its predicted quality, in [0, 1].
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    policy: str | None = None
    plan: Any = None
    explain: bool = False
    session: str | None = Field(None, min_length=1, max_length=256)
    timeout_s: float | None = Field(None, gt=0)
    max_usd: float | None = Field(None, ge=0)
    max_wh: float | None = Field(None, ge=0)
    max_gco2e: float | None = Field(None, ge=0)
    max_latency_s: float | None = Field(None, gt=0)
    quality_floor: float | None = Field(None, ge=0, le=1)

    def limits(self) -> Limits:
        """Return the ceilings and the floor as policies read them."""
        return Limits(
            max_usd=self.max_usd,
            max_wh=self.max_wh,
            max_gco2e=self.max_gco2e,
            max_latency_s=self.max_latency_s,
            quality_floor=self.quality_floor,
        )


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request: `n` choices for each of `prompts`, in the order (prompt, choice).

    `max_tokens` None leaves it to the server. `logprobs` says whether the response shows them;
    how many alternatives is in `sampling.top_logprobs`. With `continuous_usage` every chunk of a
    stream tells the usage so far. `echo` puts the prompt before the answer;
    with `max_tokens` 0 it stands alone. `reasoning` False leaves out what a model thinks first.
    `sent` is the whole body, as a member on another server gets it. With `ceiling`, `max_tokens` is
    no promise: the answer may be shorter where the model's context ends.
    """

    model: str
    prompts: tuple[Prompt, ...]
    sampling: SamplingOptions
    n: int = 1
    max_tokens: int | None = None
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: bool = False
    echo: bool = False
    reasoning: bool = True
    user: str | None = None
    sent: Mapping[str, Any] | None = None
    ceiling: bool = False
    extension: Extension = field(default_factory=Extension)

    @property
    def num_choices(self) -> int:
        """How many choices the response has."""
        return self.n * len(self.prompts)
