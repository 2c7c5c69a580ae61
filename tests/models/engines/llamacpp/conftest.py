"""One engine for a whole file of tests; imported only where there is a binding and a model."""

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import pytest

from models.engines.base import Chunk, Engine, GenerationRequest


@pytest.fixture(scope="module")
async def engine() -> AsyncIterator[Engine]:
    """A started engine of two slots."""
    from tests.models.engines.llamacpp.smollm2 import running

    async with running(options={"num_slots": 2}) as engine:
        yield engine


@pytest.fixture
def read(engine: Engine) -> Callable[[GenerationRequest], Awaitable[list[Chunk]]]:
    """Return what reads an answer of the engine."""
    from tests.models.engines.llamacpp.smollm2 import read_all

    return partial(read_all, engine)
