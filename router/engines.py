"""Engines as the executor sees them, and one in this process: the client of `shoal serve --local`.

A Ray Serve replica is the same worker (`router.replica`), so that both ways behave alike.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections import OrderedDict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Protocol

from models.answer_format import join_calls
from models.engines.base import Chunk, Engine, EngineStats, GenerationRequest, HasMetrics
from models.fair import CLIENT
from router.energy import EnergyUse, LaneMeter, Lanes, energy_of, metered

# How many cancelled requests are remembered until somebody asks what they used.
_MAX_REMEMBERED = 4096
_SETTLE_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Used:
    """What a cancelled request used: tokens that it wrote, and energy where a meter counts it."""

    num_tokens: int = 0
    energy: EnergyUse | None = None


class EngineClient(Protocol):
    """One engine of the pool, wherever it runs.

    Both ways to generate raise `RequestError`, `ContextOverflow`, `EngineOverloaded` and
    `EngineFailed` as engines do; cancelling the caller, or closing the stream, cancels the request
    at the engine within one step.
    """

    async def complete(self, request: GenerationRequest) -> Chunk:
        """Return the whole answer as one chunk."""
        ...

    def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Yield the answer as it is generated."""
        ...

    async def settle(self, request_id: str) -> Used:
        """Return what a cancelled request used, once it is over.

        Raises `EngineFailed` if the engine that ran it cannot be asked.
        """
        ...

    async def metrics(self) -> list[tuple[str, str]]:
        """Return each replica's name and its library's own metrics, in Prometheus' text format.

        Raises `EngineFailed` if the engine cannot be asked.
        """
        ...

    async def stats(self) -> EngineStats:
        """Return a snapshot; raises `EngineFailed` if the engine cannot serve."""
        ...


def merge(chunks: Sequence[Chunk]) -> Chunk:
    """Return consecutive chunks as one; what the last one says of the whole answer stays."""
    if len(chunks) < 2:
        return chunks[0] if chunks else Chunk(text="", tokens=())
    return replace(
        chunks[-1],
        text="".join(chunk.text for chunk in chunks),
        tokens=tuple(token for chunk in chunks for token in chunk.tokens),
        reasoning="".join(chunk.reasoning for chunk in chunks),
        prompt=chunks[0].prompt,
        refusal="".join(chunk.refusal for chunk in chunks),
        tool_calls=join_calls(call for chunk in chunks for call in chunk.tool_calls),
    )


@dataclass(kw_only=True)
class _Progress:
    num_tokens: int = 0
    over: asyncio.Event = field(default_factory=asyncio.Event)


class EngineWorker:
    """Drives one engine and remembers what cancelled requests used."""

    def __init__(self, engine: Engine, meter: LaneMeter | None = None) -> None:
        """Drive `engine`; a `meter` attributes its energy to requests."""
        self._engine = engine
        self._meter = meter
        self._busy_s = 0.0
        self._active: dict[str, _Progress] = {}
        self._cancelled: OrderedDict[str, Used] = OrderedDict()

    async def start(self) -> None:
        """Start the engine."""
        await self._engine.start()

    async def stop(self) -> None:
        """Stop the engine."""
        await self._engine.stop()

    async def run(self) -> None:
        """Have the engine run until cancelled."""
        await self.start()
        try:
            await asyncio.Event().wait()
        finally:
            await self.stop()

    def check_health(self) -> None:
        """Raise `EngineFailed` if the engine cannot serve any more."""
        self._engine.check_health()

    async def complete(self, request: GenerationRequest) -> Chunk:
        """Return the whole answer as one chunk."""
        async with aclosing(self.stream(request)) as chunks:
            parts = [chunk async for chunk in chunks]
        whole, energy = merge(parts), energy_of(parts[-1]) if parts else None
        return whole if energy is None else metered(whole, energy)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        """Yield the answer as it is generated."""
        CLIENT.set(request.client_id)
        progress = self._active[request.request_id] = _Progress()
        finished = False
        lanes = None if self._meter is None else self._meter.begin(len(request.members))
        try:
            async with aclosing(self._engine.generate(request)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    progress.num_tokens += len(chunk.tokens)
                    finished = chunk.finish_reason is not None
                    if finished and lanes is not None:
                        energy, lanes = self._ended(lanes), None
                        yield metered(chunk, energy)
                    else:
                        yield chunk
        finally:
            spent = None if lanes is None else self._ended(lanes)
            del self._active[request.request_id]
            if not finished:
                used = Used(num_tokens=progress.num_tokens, energy=spent)
                self._cancelled[request.request_id] = used
                if len(self._cancelled) > _MAX_REMEMBERED:
                    self._cancelled.popitem(last=False)
            progress.over.set()

    def _ended(self, lanes: Lanes) -> EnergyUse:
        assert self._meter is not None
        energy = self._meter.end(lanes)
        self._busy_s += energy.busy_s
        return energy

    async def settle(self, request_id: str) -> Used:
        """Return what a cancelled request used, once it is over."""
        progress = self._active.get(request_id)
        if progress is not None:
            async with asyncio.timeout(_SETTLE_TIMEOUT_S):
                await progress.over.wait()
        so_far = Used(num_tokens=progress.num_tokens if progress else 0)
        return self._cancelled.pop(request_id, so_far)

    async def metrics(self) -> list[tuple[str, str]]:
        """Return this process' name and the engine's own metrics; empty where it has none."""
        text = self._engine.metrics() if isinstance(self._engine, HasMetrics) else ""
        return [(f"{socket.gethostname()}-{os.getpid()}", text)]

    async def stats(self) -> EngineStats:
        """Return a snapshot."""
        self._engine.check_health()
        stats = self._engine.stats()
        if self._meter is None:
            return stats
        return replace(stats, idle_wh=self._meter.idle_share_wh(self._busy_s))


def set_num_threads(num_threads: int | None) -> None:
    """Give this process's tensor library `num_threads` CPU threads; None: all cores.

    Ray limits them to an actor's `num_cpus`, which here is a scheduling weight and not a budget.
    Does nothing where no engine has loaded the library.
    """
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(num_threads or os.cpu_count() or 1)
