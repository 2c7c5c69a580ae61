"""Vectors and scores that another server tells: how it is asked, and how its answer is read."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.engines.base import Chunk, Encoding, of_length_one
from models.engines.remote.answer import read_whole
from models.engines.remote.failures import broke_off, from_event

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


def read_vectors(body: bytes) -> dict[str, Any] | None:
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
    except (ValueError, TypeError, LookupError):  # not as agreed
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
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise broke_off(
                self._server, f"its answer cannot be read: {error!r} in {str(event)[:200]!r}"
            ) from None

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


def _num_tokens(usage: Mapping[str, Any] | None) -> int | None:
    """Return how many tokens were read; None where the server does not say."""
    told = (usage or {}).get("prompt_tokens") or (usage or {}).get("total_tokens")
    return told if isinstance(told, int) and told >= 0 else None
