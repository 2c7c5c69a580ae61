"""`/v1/embeddings` and `/v1/rerank`: what encoders tell of texts.

They take OpenAI's shape, and that of Cohere, Jina and vLLM; like any other request they pass
through policy, budgets, executor and record.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from models.engines.base import Chunk, Encoding, SamplingOptions, of_length_one
from policies.kinds import Count
from router.errors import bad_request
from router.executor.task import Prompt
from router.openai_api.endpoint import Ask, Extension, Head, ResponseWriter, Shapes, WireFormat
from router.openai_api.fields import are_token_ids, few, read_fields, read_json
from router.openai_api.shapes import AnswerFacts

MAX_INPUTS = 2048  # OpenAI's
MAX_DOCUMENTS = 1024

_REFUSED: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True,),
    "embed_dtype": ("float32",),
    "endianness": ("little", "native"),
    "input_type": (),
    "instruction": (),
    "max_chunks_per_doc": (),
    "max_tokens_per_doc": (0,),
    "max_tokens_per_query": (0,),
    "messages": (),
    "normalize": (True,),
    "output_dtype": ("float",),
    "padding": ("do_not_pad",),
    "rank_fields": ([], ["text"]),
    "return_embeddings": (False,),
    "truncation": (True,),
    "use_activation": (True,),
}


def _read_input(value: object) -> tuple[str | tuple[int, ...], ...]:
    """Read a text, a list of them, a list of token ids, or a list of such lists."""
    if isinstance(value, str) or (isinstance(value, list) and value and are_token_ids(value)):
        value = [value]
    if not isinstance(value, list) or not 0 < len(value) <= MAX_INPUTS:
        raise ValueError(f"must be a text, token ids, or a list of 1 to {MAX_INPUTS} of either")
    if all(isinstance(item, str) for item in value):
        if "" in value:
            raise ValueError("an empty text cannot be encoded")
        return tuple(value)
    if all(isinstance(item, list) and item and are_token_ids(item) for item in value):
        return tuple(map(tuple, value))
    raise ValueError("must be texts only, or token ids below 2**31 only")


def _read_documents(value: object) -> tuple[str, ...]:
    """Read texts, or objects with one each."""
    if not isinstance(value, list) or not 0 < len(value) <= MAX_DOCUMENTS:
        raise ValueError(f"must be a list of 1 to {MAX_DOCUMENTS} texts")
    told = [item.get("text") if isinstance(item, dict) else item for item in value]
    texts = tuple(text for text in told if isinstance(text, str))
    if len(texts) < len(told):
        raise ValueError("each must be a text, or an object with the key text")
    return texts


class _EncodingFields(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    model: str = Field(min_length=1, max_length=256)
    truncate_prompt_tokens: Literal[-1] | None = None
    user: str | None = Field(None, max_length=1024)
    shoal: Annotated[Extension | None, few(32)] = None

    def ask(self, encoding: Encoding, **more: Any) -> EncodingAsk:  # noqa: ANN401
        """Return what is asked for."""
        return EncodingAsk(
            model=self.model,
            prompts=(Prompt(encoding=encoding),),
            sampling=SamplingOptions(),
            max_tokens=0,
            user=self.user,
            extension=self.shoal or Extension(),
            **more,
        )


class EmbeddingFields(_EncodingFields):
    """The body of `/v1/embeddings`; with `truncate_prompt_tokens` -1 long inputs are cut."""

    input: Annotated[Any, BeforeValidator(_read_input)]
    dimensions: Count | None = None
    encoding_format: Literal["float", "base64"] | None = None


class RerankFields(_EncodingFields):
    """The body of `/v1/rerank`; documents that are too long are cut."""

    query: str = Field(min_length=1)
    documents: Annotated[Any, BeforeValidator(_read_documents)]
    top_n: Count | None = None
    return_documents: bool | None = None


@dataclass(frozen=True, kw_only=True)
class EncodingAsk(Ask):
    """What an encoder is asked, and how it is told: the fields of one of the two bodies."""

    dimensions: int | None = None
    base64: bool = False
    top_n: int | None = None
    documents: tuple[str, ...] | None = None


class EmbeddingUsage(BaseModel):
    """How many tokens were read."""

    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    """One input's vector, of length one: numbers, or the base64 of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingList(BaseModel):
    """The vectors of all inputs, in their order."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage
    shoal: AnswerFacts


class RankedText(BaseModel):
    """A document."""

    text: str


class Ranked(BaseModel):
    """How well one document answers the query."""

    index: int
    relevance_score: float
    document: RankedText | None = None


class Ranking(BaseModel):
    """The documents, best first."""

    id: str
    model: str
    results: list[Ranked]
    usage: EmbeddingUsage
    shoal: AnswerFacts


class EmbeddingsEndpoint(WireFormat):
    """Reads requests for vectors and writes them."""

    path = "/v1/embeddings"
    id_prefix = "embd-"
    shapes = Shapes(takes=EmbeddingFields, answers=EmbeddingList)

    def parse(self, body: bytes) -> Ask:
        """Return what `body` asks for; raises `ApiError`."""
        fields = read_fields(EmbeddingFields, read_json(body), _REFUSED)
        cut = fields.truncate_prompt_tokens is not None
        return fields.ask(
            Encoding(inputs=fields.input, cut=cut),
            dimensions=fields.dimensions,
            base64=fields.encoding_format == "base64",
        )

    async def writer(self, head: Head, ask: Ask) -> ResponseWriter:
        """Return what writes the vectors."""
        assert isinstance(ask, EncodingAsk)
        return VectorWriter(head=head, ask=ask)


class RerankEndpoint(WireFormat):
    """Reads requests for a ranking and writes it; vLLM and Cohere have it at other paths, too."""

    id_prefix = "rerank-"
    shapes = Shapes(takes=RerankFields, answers=Ranking)

    def __init__(self, path: str = "/v1/rerank") -> None:
        self.path = path

    def parse(self, body: bytes) -> Ask:
        """Return what `body` asks for; raises `ApiError`."""
        fields = read_fields(RerankFields, read_json(body), _REFUSED)
        return fields.ask(
            Encoding(inputs=fields.documents, query=fields.query, cut=True),
            top_n=fields.top_n,
            documents=None if fields.return_documents is False else fields.documents,
        )

    async def writer(self, head: Head, ask: Ask) -> ResponseWriter:
        """Return what writes the ranking."""
        assert isinstance(ask, EncodingAsk)
        return RankWriter(head=head, ask=ask)


@dataclass(kw_only=True)
class _RowWriter(ResponseWriter):
    """Writes what an encoder tells, which never streams."""

    head: Head
    ask: EncodingAsk

    def chunk(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:  # noqa: ARG002
        """Return nothing."""
        return []


class VectorWriter(_RowWriter):
    """Writes vectors."""

    def whole(self, choices: list[Chunk], usage: Mapping[str, Any]) -> dict[str, Any]:
        """Return the whole response; raises `ApiError`, 400, for too many dimensions."""
        rows = _shortened(_rows(choices), self.ask.dimensions)
        return {
            "id": self.head.id,
            "object": "list",
            "created": self.head.created_s,
            "model": self.head.model,
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": _packed(row) if self.ask.base64 else row.tolist(),
                }
                for index, row in enumerate(rows)
            ],
            "usage": _usage(usage),
        }


class RankWriter(_RowWriter):
    """Writes rankings."""

    def whole(self, choices: list[Chunk], usage: Mapping[str, Any]) -> dict[str, Any]:
        """Return the whole response: of equal documents the earlier one first."""
        scores = _rows(choices)[:, 0].tolist()
        order = sorted(range(len(scores)), key=lambda index: -scores[index])[: self.ask.top_n]
        documents = self.ask.documents
        return {
            "id": self.head.id,
            "model": self.head.model,
            "results": [
                {
                    "index": index,
                    "relevance_score": scores[index],
                    **({"document": {"text": documents[index]}} if documents else {}),
                }
                for index in order
            ],
            "usage": _usage(usage),
        }


def _rows(choices: list[Chunk]) -> NDArray[np.float32]:
    [answer] = choices
    assert answer.rows is not None, "who was asked to encode has encoded"
    return answer.rows


def _shortened(rows: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    """Return the first `dimensions` of each row, scaled to length one again."""
    if dimensions is None:
        return rows
    if dimensions > rows.shape[1]:
        raise bad_request(
            f"dimensions: {dimensions} is more than the {rows.shape[1]} that the model has",
            "dimensions",
        )
    return of_length_one(rows[:, :dimensions])


def _packed(row: NDArray[np.float32]) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


def _usage(usage: Mapping[str, Any]) -> dict[str, int]:
    return {"prompt_tokens": usage["prompt_tokens"], "total_tokens": usage["total_tokens"]}
