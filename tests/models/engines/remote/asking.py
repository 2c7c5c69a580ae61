"""A remote engine before a scripted server, and ways to ask it."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from models.answer_format import Tools
from models.engines.base import Chunk, GenerationRequest, SamplingOptions
from models.engines.registry import create_engine
from models.engines.remote.engine import RemoteEngine
from models.spec import EngineSpec, Model, ModelSpec, RemoteModelSpec
from tests.models.engines.remote.bad_server import BadServer, Reply

KEY = "sk-very-secret"
FAST = {"backoff_s": 0.01, "connect_timeout_s": 60}
HELLO = {"choices": [{"index": 0, "delta": {"content": "Hello"}}]}
STOP = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
OFFERED = Tools(
    functions=tuple({"type": "function", "function": {"name": name}} for name in ("find", "open"))
)


def remote_models(*names: str, **fields: Any) -> list[Model]:
    """Return models that the scripted server calls up-a, up-b and so on."""
    specs = {name: RemoteModelSpec(model=f"up-{name}", **fields) for name in names}
    return [
        Model(spec=ModelSpec(name=name, engine="e", remote=spec), card=None)
        for name, spec in specs.items()
    ]


def spec_of(url: str, **options: Any) -> EngineSpec:
    """Return the engine of a pool file for the server at `url`."""
    queued = options.pop("max_queued_requests", 8)
    return EngineSpec(
        name="e",
        kind="remote",
        options={"base_url": url, **FAST, **options},
        max_queued_requests=queued,
    )


@asynccontextmanager
async def running_engine(
    server: BadServer, *, remote: Mapping[str, Any] | None = None, **options: Any
) -> AsyncIterator[RemoteEngine]:
    """Run an engine with the members a and b, of which the pool file says `remote`."""
    models = remote_models("a", "b", **(remote or {}))
    engine = create_engine(spec_of(server.url, **options), models)
    assert isinstance(engine, RemoteEngine)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def request_of(**fields: Any) -> GenerationRequest:
    """Return a request of member a."""
    sampling = SamplingOptions(**fields.pop("sampling", {}))
    fields.setdefault("messages", ({"role": "user", "content": "hello"},))
    return GenerationRequest(
        request_id="r-1", prompt_tokens=(0, 0), members=("a",), sampling=sampling, **fields
    )


async def read(engine: RemoteEngine, request: GenerationRequest) -> list[Chunk]:
    """Return all chunks of the answer."""
    return [chunk async for chunk in engine.generate(request)]


def text_of(chunks: list[Chunk]) -> str:
    """Return the whole text."""
    return "".join(chunk.text for chunk in chunks)


def ask(
    *events: Any, reply: Reply | None = None, tools: Tools | None = None, logprobs: bool = False
) -> list[Chunk]:
    """Return the chunks of the answer that a server tells in `events`."""

    async def run() -> list[Chunk]:
        told = reply or Reply(events=list(events))
        async with (
            BadServer.running(told) as server,
            running_engine(server, logprobs=logprobs, max_retries=0) as engine,
        ):
            return await read(engine, request_of(tools=tools))

    return asyncio.run(run())
