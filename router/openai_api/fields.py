"""The fields that chat and text completions share, and how a body is read.

Unknown fields are tolerated, as OpenAI's clients expect; known ones that this server cannot
honour are refused by name, unless their value asks for nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from models.engines.base import SamplingOptions
from policies.kinds import MOST_COUNT, Count
from router.errors import ApiError, bad_request
from router.openai_api.ask import Extension

MAX_CHOICES = 128


def _read_stop(value: object) -> tuple[str, ...]:
    items = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
        raise ValueError("must be a non-empty string or a list of them")
    if len(items) > 4:
        raise ValueError("at most 4 stop strings are allowed")
    return tuple(items)


def _read_logit_bias(value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and biases")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        if not (str(key).isdecimal() and len(key) <= 10 and int(key) <= MOST_COUNT):
            raise ValueError(f"the key {key!r} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias {bias!r} of token {key} is not a number in [-100, 100]")
        biases[int(key)] = float(bias)
    return biases


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class SharedFields(BaseModel):
    """Fields of both endpoints; `shoal` and the last four are extensions, as vLLM has them."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str = Field(min_length=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[int, float], BeforeValidator(_read_logit_bias)] = Field(
        default_factory=dict
    )
    max_tokens: Count | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[tuple[str, ...], BeforeValidator(_read_stop)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    user: str | None = None
    shoal: Extension | None = None
    top_k: int | None = Field(None, ge=-1, le=MOST_COUNT)
    min_p: float | None = Field(None, ge=0, le=1)
    ignore_eos: bool | None = None

    def sampling(
        self, *, top_logprobs: int | None = None, json_schema: str | None = None
    ) -> SamplingOptions:
        """Return how tokens are drawn; `max_tokens` is set where the plan runs."""
        return SamplingOptions(
            temperature=1.0 if self.temperature is None else self.temperature,
            # OpenAI allows 0, which can only mean the likeliest token.
            top_p=1.0 if self.top_p is None else max(self.top_p, 1e-6),
            # vLLM's clients send -1 or 0 for "off".
            top_k=self.top_k if self.top_k and self.top_k > 0 else None,
            min_p=self.min_p or None,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=self.logit_bias,
            seed=self.seed,
            stop=self.stop,
            top_logprobs=top_logprobs,
            json_schema=json_schema,
            ignore_eos=bool(self.ignore_eos),
        )

    def include_usage(self) -> bool:
        """Return whether a stream ends with a chunk of usage; refuse the option elsewhere."""
        if self.stream_options is None:
            return False
        if not self.stream:
            raise bad_request("stream_options needs stream: true", "stream_options")
        return bool(self.stream_options.include_usage)


Fields = TypeVar("Fields", bound=BaseModel)


def read_body(
    schema: type[Fields], body: bytes, unsupported: Mapping[str, tuple[Any, ...]]
) -> Fields:
    """Return the body's fields.

    `unsupported` holds the known fields that cannot be honoured, each with the values that ask
    for nothing (null always does). Raises `ApiError`, 400, that names the field.
    """
    try:
        fields = schema.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from None
    for name, value in (fields.model_extra or {}).items():
        if name in unsupported and value is not None and value not in unsupported[name]:
            raise bad_request(
                f"{name} is not supported by this server", name, "unsupported_parameter"
            )
    return fields


def read_schema(value: Mapping[str, Any] | None) -> str | None:
    """Return the JSON schema that a `response_format` asks for; None for plain text."""
    if value is None or value.get("type") == "text":
        return None
    if value.get("type") == "json_object":
        return '{"type":"object"}'
    if value.get("type") != "json_schema":
        raise bad_request(
            f"response_format.type {value.get('type')!r} is unknown; "
            "allowed are text, json_object, json_schema",
            "response_format.type",
        )
    wanted = value.get("json_schema")
    if not isinstance(wanted, dict) or not isinstance(wanted.get("schema"), dict):
        raise bad_request(
            "response_format.json_schema needs a schema object", "response_format.json_schema"
        )
    return json.dumps(wanted["schema"])


def _explain(error: ValidationError) -> ApiError:
    detail = error.errors(include_url=False, include_context=False)[0]
    if detail["type"] == "json_invalid":
        return bad_request(f"The body is not valid JSON: {detail['msg']}", code="invalid_json")
    if not detail["loc"]:
        return bad_request("The body must be a JSON object", code="invalid_json")
    param = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in detail["loc"])[1:]
    if detail["type"] == "missing":
        return bad_request(f"{param} is missing", param, "missing_required_parameter")
    if detail["type"] == "extra_forbidden":
        return bad_request(f"{param} is unknown", param, "unknown_parameter")
    message = detail["msg"].removeprefix("Value error, ")
    return bad_request(f"{param}: {message}", param)
