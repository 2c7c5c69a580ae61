"""The last chunk of an answer whose energy was measured."""

from __future__ import annotations

from dataclasses import dataclass, fields

from models.engines.base import Chunk
from router.energy.lanes import EnergyUse


@dataclass(frozen=True, kw_only=True, slots=True)
class MeteredChunk(Chunk):
    """A chunk that also says what the whole answer used."""

    energy: EnergyUse


def metered(chunk: Chunk, energy: EnergyUse) -> MeteredChunk:
    """Return `chunk` with what the answer used."""
    return MeteredChunk(**{f.name: getattr(chunk, f.name) for f in fields(Chunk)}, energy=energy)


def energy_of(chunk: Chunk) -> EnergyUse | None:
    """Return what the answer used, if this is its last chunk and somebody measured it."""
    return chunk.energy if isinstance(chunk, MeteredChunk) else None
