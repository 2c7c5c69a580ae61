"""What an engine of an encoder tells, whichever library computes."""

from __future__ import annotations

import asyncio
from pathlib import Path

from models.card import read_card
from models.engines.base import Chunk, Encoding, GenerationRequest
from models.engines.registry import create_engine, engine_traits
from models.spec import EngineSpec, Model, ModelSpec


def told(spec: EngineSpec, checkpoint: Path, *asked: Encoding) -> list[Chunk | BaseException]:
    """Return what the engine of `checkpoint` tells of each of `asked`, all at once."""
    source = ModelSpec(name="m", engine=spec.name, checkpoint=str(checkpoint))
    model = Model(spec=source, card=read_card(checkpoint), tokenizer=checkpoint)

    async def run() -> list[Chunk | BaseException]:
        engine = create_engine(spec, [model])
        await engine.start()
        try:
            requests = [
                GenerationRequest(request_id=str(i), prompt_tokens=(), members=("m",), encoding=one)
                for i, one in enumerate(asked)
            ]
            return await asyncio.gather(
                *(anext(engine.generate(request)) for request in requests), return_exceptions=True
            )
        finally:
            await engine.stop()

    assert engine_traits(spec, [model]).encodes.keys() == {"m"}
    return asyncio.run(run())
