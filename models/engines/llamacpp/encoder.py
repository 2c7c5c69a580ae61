"""An encoder inside llama.cpp: a GGUF file that tells vectors, or scores of pairs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from models.card import ModelCard
from models.engines.base import Encodes
from models.engines.encoder.engine import Encoder, EncoderEngine, TextReader
from models.engines.llamacpp import LlamacppOptions, pooling_of, slots
from models.engines.llamacpp.binding import Server
from models.spec import EngineSpec
from models.tokenizer_json import read_tokenizer

# Their files tell a probability; other rankers' tell a logit.
_TELL_PROBABILITIES = ("qwen3", "qwen3vl")


class LlamacppEncoder:
    """One loaded file; see `models.engines.encoder.engine.Encoder`. llama.cpp batches by itself."""

    def __init__(self, spec: EngineSpec, options: LlamacppOptions, card: ModelCard) -> None:
        """Load it, which blocks; raises `PoolError`."""
        pooling, (_, context_tokens) = pooling_of(options, card), slots(spec, options, card)
        self.reader = TextReader(
            read_tokenizer(card.path), max_tokens=context_tokens, cross=pooling == "rank"
        )
        self._probabilities = card.shape.architecture in _TELL_PROBABILITIES
        self._server = Server(spec, options, card, pooling)

    async def vectors(self, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Return the vectors of all `rows`."""
        vectors, _ = await asyncio.to_thread(self._server.embed, rows)
        return np.asarray(vectors, np.float32)

    async def scores(self, query: str, texts: Sequence[str]) -> tuple[NDArray[np.float32], int]:
        """Return the scores of `texts`."""
        scores, num_tokens = await asyncio.to_thread(self._ranked, query, texts)
        found = np.asarray(scores, np.float32)
        return found if self._probabilities else expit(found), num_tokens

    def close(self) -> None:
        """Free the model."""
        self._server.close()

    def _ranked(self, query: str, texts: Sequence[str]) -> tuple[list[float], int]:
        """Rank texts, cut to the room that the query leaves: llama.cpp refuses longer ones."""
        cut = []
        for text, pair in zip(texts, self.reader.pairs(query, texts), strict=True):
            of_text = zip(pair.sequence_ids, pair.offsets, strict=True)
            cut.append(text[: max((end for which, (_, end) in of_text if which == 1), default=0)])
        return self._server.rank(query, cut)


def encoder_engine(
    spec: EngineSpec,
    options: LlamacppOptions,
    name: str,
    card: ModelCard,
    encodes: Sequence[Encodes],
) -> EncoderEngine:
    """Return the engine of an encoder's file."""

    async def load() -> Encoder:
        return await asyncio.to_thread(LlamacppEncoder, spec, options, card)

    num_slots, _ = slots(spec, options, card)
    return EncoderEngine(spec, name, encodes, load, num_at_once=num_slots)
