"""How a server is asked: where it is, with what patience, and in which words; and how its answer is
read where that is vectors or scores (`answer` reads texts).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from models.engines.base import Chunk, Encoding, GenerationRequest, Structure, of_length_one
from models.engines.remote.answer import read_count
from models.engines.remote.events import read_whole
from models.engines.remote.failures import broke_off, from_event, unreadable
from models.errors import PoolError
from policies.json_text import UNREADABLE
from policies.kinds import Strict

_JSON_OBJECT = '{"type":"object"}'
# What a client's body tells Shoal and not the model: who answers, how often, and in which form. The
# seed is here because choices of one prompt differ in it.
_OURS = (
    *("model", "shoal", "n", "best_of", "echo", "stream", "stream_options"),
    *("messages", "prompt", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs"),
    "seed",
)


_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e]*")


class RemoteOptions(Strict):
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
        for name, value in self.headers.items():
            if name.lower() == "authorization":
                raise ValueError("a key belongs into api_key_env or api_key_file, not into headers")
            if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
                raise ValueError(f"headers: {name!r} is none that HTTP knows, or its value is none")
        return self

    def read_key(self, engine: str) -> str | None:
        """Return the key; None where none is configured. `PoolError` for one that cannot be."""
        where = f"engines.{engine}.options"
        if self.api_key_env is not None:
            source = f"{where}.api_key_env: the environment variable {self.api_key_env}"
            key = os.environ.get(self.api_key_env, "").strip()
            if not key:
                raise PoolError(f"{source} is not set where the engine runs")
        elif self.api_key_file is not None:
            source = f"{where}.api_key_file: {self.api_key_file}"
            try:
                key = self.api_key_file.read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise PoolError(f"{source} cannot be read: {type(error).__name__}") from None
            if not key:
                raise PoolError(f"{source} is empty")
        else:
            return None
        if not _HEADER_VALUE.fullmatch(key):
            raise PoolError(
                f"{source} holds no key: it has several lines, or other than ASCII's characters"
            )
        return key


def write_body(
    request: GenerationRequest, model: str, options: RemoteOptions
) -> tuple[str, dict[str, Any]]:
    """Return the path and the JSON body that ask the server's `model` for `request`.

    What the client sent goes on unchanged, fields that only that server knows included; what it did
    not send is left to the server. A conversation goes to the chat endpoint. A text, or token ids
    (which must be that model's own), go to the completions endpoint.
    """
    if request.encoding is not None:
        return write_encoding(request.encoding, model)
    sampling, sent = request.sampling, request.sent or {}
    body = {name: value for name, value in sent.items() if name not in _OURS and value is not None}
    if not sent:
        body = _written(request)
    body |= {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
        options.max_tokens_field: sampling.max_tokens,
    }
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    if request.messages is not None:
        messages = sent.get("messages", request.messages)
        body["messages"] = [dict(message) for message in messages]
        if options.logprobs:
            body["logprobs"] = True
            if sampling.top_logprobs:
                body["top_logprobs"] = sampling.top_logprobs
        return "/chat/completions", body
    body["prompt"] = list(request.prompt_tokens) if request.text is None else request.text
    if options.logprobs:
        num_top = max(sampling.top_logprobs or 0, sampling.prompt_logprobs or 0)
        body["logprobs"] = min(num_top, options.completion_logprobs)
    # This endpoint has never known another name for it.
    body["max_tokens"] = body.pop(options.max_tokens_field)
    if sampling.prompt_logprobs is not None:
        # Whole, so that it is told how many of the tokens are the prompt's.
        body |= {"echo": True, "stream": False}
        del body["stream_options"]
    return "/completions", body


def _written(request: GenerationRequest) -> dict[str, Any]:
    """Return the fields of a request that no client sent, as far as they are not the defaults."""
    sampling, tools = request.sampling, request.tools
    asked = {
        "temperature": sampling.temperature if sampling.temperature != 1 else None,
        "top_p": sampling.top_p if sampling.top_p < 1 else None,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty or None,
        "frequency_penalty": sampling.frequency_penalty or None,
        "logit_bias": {str(i): bias for i, bias in sampling.logit_bias.items()} or None,
        "stop": list(sampling.stop) or None,
        "ignore_eos": sampling.ignore_eos or None,
        "response_format": _response_format(sampling.structure),
        "tools": [dict(tool) for tool in tools.functions] if tools else None,
        "tool_choice": tools.choice if tools else None,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _response_format(structure: Structure | None) -> dict[str, Any] | None:
    if structure is None:
        return None
    if structure.text == _JSON_OBJECT:
        return {"type": "json_object"}
    wanted = {
        "name": structure.name or "answer",
        "schema": json.loads(structure.text),
        "strict": structure.strict,
    }
    return {"type": "json_schema", "json_schema": wanted}


_VECTOR = re.compile(rb'"embedding"\s*:\s*(\[[^][{}"]*\])')


def write_encoding(encoding: Encoding, model: str) -> tuple[str, dict[str, Any]]:
    """Return the path and the JSON body that ask the server's `model`.

    Vectors are asked for as OpenAI's API has it, scores as Cohere's, Jina's and vLLM's have. Only
    vLLM knows how to be told that long texts are to be cut; scores are told of cut ones anyway.
    """
    inputs = [text if isinstance(text, str) else list(text) for text in encoding.inputs]
    if encoding.query is not None:
        return "/rerank", {"model": model, "query": encoding.query, "documents": inputs}
    body = {"model": model, "input": inputs, "encoding_format": "float"}
    return "/embeddings", body | ({"truncate_prompt_tokens": -1} if encoding.cut else {})


def read_vectors(body: bytes | bytearray) -> dict[str, Any] | None:
    """Return the one object that a server tells, its vectors as arrays; None if it is none.

    Each vector is parsed by itself, so that a thread that reads thousands of them holds the
    interpreter's lock for none too long.
    """
    vectors: list[NDArray[np.float32]] = []

    def keep(found: re.Match[bytes]) -> bytes:
        vectors.append(np.asarray(json.loads(found[1]), np.float32))
        return b'"embedding":%d' % (len(vectors) - 1)

    try:
        told = read_whole(_VECTOR.sub(keep, body))
        if told is not None and vectors:
            for entry in told["data"]:
                entry["embedding"] = vectors[entry["embedding"]]
    except UNREADABLE:
        return None
    return told


class RowReader:
    """Reads the one object of an answer into a chunk of rows; see `answer.EventReader`."""

    def __init__(self, *, server: str, encoding: Encoding) -> None:
        """`encoding` is what the server was asked."""
        self._server = server
        self._encoding = encoding
        self._answer: Chunk | None = None

    @property
    def ended(self) -> bool:
        """Whether the answer is whole."""
        return self._answer is not None

    def done(self) -> None:
        """Such answers announce no end."""

    def read(self, event: Mapping[str, Any] | str) -> None:
        """Keep what the server tells; raises `AttemptFailed`."""
        try:
            if isinstance(event, str):
                raise ValueError("no JSON")
            if event.get("error"):
                raise from_event(self._server, event["error"])
            self._answer = Chunk(
                text="",
                tokens=(),
                finish_reason="stop",
                rows=self._rows(event),
                prompt_tokens=_num_tokens(event.get("usage") or event.get("meta")),
            )
        except UNREADABLE as error:
            raise unreadable(self._server, event, error) from None

    def last(self) -> Chunk:
        """Return the rows; raises `AttemptFailed` where there are none."""
        if self._answer is None:
            raise broke_off(self._server, "the answer broke off")
        return self._answer

    def _rows(self, told: Mapping[str, Any]) -> NDArray[np.float32]:
        """Return a row for each input; raises `ValueError` where one is missing or is no row."""
        scored = self._encoding.query is not None
        entries: Sequence[Mapping[str, Any]] = told["results" if scored else "data"]
        rows: dict[int, Any] = {}
        for place, entry in enumerate(entries):
            score = [entry.get("relevance_score", entry.get("score"))]
            rows[int(entry.get("index", place))] = score if scored else entry["embedding"]
        found = np.asarray([rows[i] for i in range(len(self._encoding.inputs))], np.float32)
        if found.ndim != 2 or not np.isfinite(found).all():
            raise ValueError("its rows are no numbers, or of several lengths")
        return found if scored else of_length_one(found)


def _num_tokens(usage: object) -> int | None:
    """Return how many tokens were read; None where the server does not say."""
    told = usage if isinstance(usage, Mapping) else {}
    return read_count(told.get("prompt_tokens") or told.get("total_tokens"))
