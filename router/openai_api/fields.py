"""The fields that chat and text completions share, and how a body is read.

A field is honoured (it stands in an endpoint's schema), refused by name (in `REFUSED`, unless its
value asks for nothing), or known to nobody, and then tolerated as OpenAI's clients expect.
docs/api.md has them all in one table; a test holds the two together.
"""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from models.engines.base import SamplingOptions, Structure
from policies.kinds import MOST_COUNT, Count
from router.errors import ApiError, bad_request
from router.openai_api.constraints import read_structure
from router.openai_api.endpoint import Extension

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_BIASES = 1024
_MAX_FIELDS = 256

REFUSED: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "cache_salt": (),
    "chat_template": (),
    "documents": ([],),
    "ec_transfer_params": (),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logprob_token_ids": ([],),
    "logits_processors": ([],),
    "media_io_kwargs": ({},),
    "mm_payload": (),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "prompt_cache_options": ({}, {"mode": "implicit"}),
    "prompt_cache_retention": ("in_memory",),
    "prompt_logprobs": (),
    "repetition_detection": (),
    "request_id": (),
    "return_mm_kwargs": (False,),
    "return_prompt_text": (False,),
    "return_token_ids": (False,),
    "return_token_offsets": (False,),
    "return_tokens_as_token_ids": (False,),
    "routed_experts_prompt_start": (0,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "stream_interval": (1,),
    "structural_tag": (),
    "thinking_token_budget": (),
    "truncation_side": ("left",),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
"""Fields of OpenAI or vLLM that this server does not honour, with the values that ask for nothing.

null always does. What stands in an endpoint's own list adds to these.
"""


def _read_stop(value: object) -> tuple[str, ...]:
    items = [] if value is None else [value] if isinstance(value, str) else value
    if isinstance(items, list) and len(items) > MAX_STOPS:
        raise ValueError(f"at most {MAX_STOPS} stop strings are allowed")
    if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
        raise ValueError("must be a non-empty string or a list of them")
    if any(len(item) > MAX_STOP_CHARACTERS for item in items):
        raise ValueError(f"a stop string has at most {MAX_STOP_CHARACTERS} characters")
    return tuple(items)


def are_token_ids(values: Collection[Any]) -> bool:
    """Whether all `values` may be ids of tokens of some vocabulary."""
    return set(map(type, values)) <= {int} and all(
        0 <= bound <= MOST_COUNT for bound in (min(values, default=0), max(values, default=0))
    )


def _read_some(value: int | None) -> int | None:
    if value == 0:
        raise ValueError("must be positive, or -1")
    return value


def few(most: int) -> BeforeValidator:
    """Return what refuses a list or object of more than `most` entries before it looks at any."""

    def check(value: object) -> object:
        if isinstance(value, list | dict) and len(value) > most:
            raise ValueError(f"at most {most} entries are allowed")
        return value

    return BeforeValidator(check)


# A client's own records of what is kept, within OpenAI's bounds.
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
    few(16),
]


def _read_logit_bias(value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and biases")
    if len(value) > MAX_BIASES:
        raise ValueError(f"at most {MAX_BIASES} tokens may have a bias")
    biases: dict[int, float] = {}
    for key, bias in value.items():
        text = str(key)
        if not (text.isascii() and text.isdecimal() and len(text) < 11 and int(text) <= MOST_COUNT):
            raise ValueError(f"the key {text[:40]!r} is not a token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {text} is not a number in [-100, 100]")
        biases[int(text)] = float(bias)
    return biases


def text_or(entries: str) -> BeforeValidator:
    """Return what refuses all but a text or a list of objects, which are called `entries`."""

    def check(value: object) -> object:
        items = value if isinstance(value, list) else []
        if not isinstance(value, str | list) or not all(isinstance(one, dict) for one in items):
            raise ValueError(f"must be a string or a list of {entries}")
        return value

    return BeforeValidator(check)


def texts_of(content: object, where: str, *, entry: str, kinds: Mapping[str, str]) -> list[str]:
    """Return the texts of a content: a text itself, or a list of objects, each called an `entry`.

    By the `kinds` of entries that are texts it is told under which key each has its own. Raises
    `ApiError`, 400, for all others.
    """
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise bad_request(f"{where}: must be a string or a list of {entry}s", where)
    texts: list[str] = []
    for one in content:
        kind = one.get("type") if isinstance(one, dict) else None
        text = one.get(kinds.get(kind)) if isinstance(kind, str) else None
        if not isinstance(text, str):
            raise bad_request(
                f"{where}: a {entry} of type {kind!r} is not supported here; text is",
                where,
                "unsupported_parameter",
            )
        texts.append(text)
    return texts


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`; vLLM's `continuous_usage_stats`: every chunk tells the usage."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SharedFields(BaseModel):
    """Fields of both endpoints: first OpenAI's, then `shoal` and vLLM's.

    `min_tokens`, `structured_outputs` and others of vLLM's are refused by engines that cannot
    honour them, see `models.engines.kind.EngineTraits`. `session_id` or `prompt_cache_key` names
    the conversation and `safety_identifier` the user, where `shoal.session` and `user` do not.
    `metadata` is for the client's own records.
    """

    model_config = ConfigDict(strict=True, extra="allow")

    model: str = Field(min_length=1, max_length=256)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[dict[int, float], BeforeValidator(_read_logit_bias)] = Field(
        default_factory=dict
    )
    max_tokens: Count | None = None
    metadata: Annotated[dict[str, str] | None, few(16)] = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    prompt_cache_key: str | None = Field(None, max_length=256)
    response_format: dict[str, Any] | None = None
    safety_identifier: str | None = Field(None, max_length=1024)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[tuple[str, ...], BeforeValidator(_read_stop)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    user: str | None = Field(None, max_length=1024)

    shoal: Annotated[Extension | None, few(32)] = None
    guided_choice: list[str] | None = Field(None, max_length=MAX_BIASES, fail_fast=True)
    guided_grammar: str | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    min_tokens: int | None = Field(None, ge=0, le=MOST_COUNT)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    session_id: str | None = Field(None, max_length=256)
    stop_token_ids: list[Annotated[int, Field(ge=0, le=MOST_COUNT)]] | None = Field(
        None, max_length=MAX_BIASES, fail_fast=True
    )
    structured_outputs: dict[str, Any] | None = None
    top_k: int | None = Field(None, ge=-1, le=MOST_COUNT)
    truncate_prompt_tokens: Annotated[int | None, AfterValidator(_read_some)] = Field(
        None, ge=-1, le=MOST_COUNT
    )

    def sampling(self, *, top_logprobs: int | None = None) -> SamplingOptions:
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
            repetition_penalty=self.repetition_penalty or 1.0,
            logit_bias=self.logit_bias,
            seed=self.seed,
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            include_stop=bool(self.include_stop_str_in_output),
            min_tokens=self.min_tokens or 0,
            top_logprobs=top_logprobs,
            structure=self._structure(),
            ignore_eos=bool(self.ignore_eos),
        )

    def check_min_tokens(self, max_tokens: int | None) -> None:
        """Refuse to draw more tokens than `max_tokens`; raises `ApiError`, 400."""
        if max_tokens is not None and (self.min_tokens or 0) > max_tokens:
            raise bad_request(
                f"min_tokens: {self.min_tokens} is more than max_tokens ({max_tokens})",
                "min_tokens",
            )

    def include_usage(self) -> bool:
        """Return whether a stream ends with a chunk of usage; refuse the option elsewhere."""
        if self.stream_options is None:
            return False
        if not self.stream:
            raise bad_request("stream_options needs stream: true", "stream_options")
        return bool(self.stream_options.include_usage)

    def continuous_usage(self) -> bool:
        """Return whether each of a stream's chunks tells the usage so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def extension(self) -> Extension:
        """Return the `shoal` object; where it names no session, other fields do."""
        extension = self.shoal or Extension()
        session = extension.session or self.session_id or self.prompt_cache_key or None
        return extension.model_copy(update={"session": session})

    def _structure(self) -> Structure | None:
        guided = {
            "json": self.guided_json,
            "regex": self.guided_regex,
            "choice": self.guided_choice,
            "grammar": self.guided_grammar,
        }
        return read_structure(self.response_format, self.structured_outputs, guided)


_TYPE = re.compile(r"str|int|bool|(dict|list|function-[a-z]+)\[.*\]")
_DICTIONARY = re.compile(r"dictionary( or instance of \w+)?")
Fields = TypeVar("Fields", bound=BaseModel)
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


def read_json(body: bytes) -> dict[str, Any]:
    """Return the object that `body` is; raises `ApiError`, 400."""
    try:
        # Some begin with a mark of their encoding, which a parser may ignore (RFC 8259, 8.1).
        # Its cache of strings costs a quarter of the time where many keys differ, and saves none.
        data = from_json(body.removeprefix(BOM_UTF8), allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise bad_request(f"The body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise bad_request("The body must be a JSON object", code="invalid_json")
    if len(data) > _MAX_FIELDS:
        raise bad_request(f"The body has more than {_MAX_FIELDS} fields", code="body_too_complex")
    return data


def read_fields(
    schema: type[Fields], data: Mapping[str, Any], refused: Mapping[str, tuple[Any, ...]]
) -> Fields:
    """Return the fields of a body's object.

    `refused` adds to `REFUSED` what this endpoint alone does not honour. Raises `ApiError`, 400,
    that names the field.
    """
    try:
        fields = schema.model_validate(data)
    except ValidationError as error:
        raise _explain(error) from None
    for name, value in (fields.model_extra or {}).items():
        harmless = refused.get(name, REFUSED.get(name))
        if harmless is not None and value is not None and value not in harmless:
            raise bad_request(
                f"{name} is not supported by this server", name, "unsupported_parameter"
            )
    return fields


def _explain(error: ValidationError) -> ApiError:
    detail = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # Where a field may be of several types, the last part is one of these.
    loc = [part for part in detail["loc"] if not (isinstance(part, str) and _TYPE.fullmatch(part))]
    param = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc)[1:]
    if detail["type"] == "missing":
        return bad_request(f"{param} is missing", param, "missing_required_parameter")
    if detail["type"] == "extra_forbidden":
        return bad_request(f"{param} is unknown", param, "unknown_parameter")
    message = _DICTIONARY.sub("object", detail["msg"].removeprefix("Value error, "))
    return bad_request(f"{param}: {message}" if param else message, param or None)
