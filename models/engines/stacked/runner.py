"""Everything of one engine that lives on the device: weights, cache, and the step over both."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from models.card import ModelCard
from models.engines.base import GenerationRequest, SamplingOptions
from models.engines.stacked.architecture import read_architecture
from models.engines.stacked.cache import Arena
from models.engines.stacked.fusion import fuse
from models.engines.stacked.layout import Layout, Part, build_layout
from models.engines.stacked.model import StackedModel
from models.engines.stacked.sampler import Draw, SamplerState, draw
from models.engines.stacked.sequence import Sequence
from models.engines.stacked.text import TextStream
from models.engines.stacked.weights import load_weights
from models.errors import PoolError


class Runner:
    """Runs steps. Calls may come from any thread, one at a time, within `torch.inference_mode`."""

    def __init__(
        self,
        cards: Seq[ModelCard],
        *,
        kv_memory_bytes: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Load the members' weights. Raises `PoolError` for a checkpoint it cannot compute."""
        architectures = [read_architecture(card) for card in cards]
        self.architecture = architectures[0]
        for card, other in zip(cards, architectures, strict=True):
            if other != self.architecture:
                raise PoolError(
                    f"{card.path / 'config.json'}: members of a stacked engine need one "
                    f"architecture, but this is {other}, and the first member's {self.architecture}"
                )
        weights = load_weights(cards, self.architecture, device, dtype)
        self.arena = Arena(self.architecture.shape, kv_memory_bytes, device, dtype)
        self._model = StackedModel(self.architecture, weights)
        self._num_members = len(cards)
        self._device = device
        self._layout: Layout | None = None
        self._drawn_R: Tensor | None = None

    def step(self, parts: Seq[Part]) -> Draw | None:
        """Run `parts` and draw the next token of those that are through their prompt, in order.

        None where none is. Writes the cache; changes no sequence but its sampler's generator.
        """
        layout = self._layout_of(parts)
        self._layout = None  # until this step has succeeded
        hidden_ND = self._model.forward(layout, self.arena)
        sampling = [part.sequence for part in parts if part.samples]
        if not sampling:
            return None
        if layout.sampled_rows_L is not None:
            hidden_ND = hidden_ND.index_select(0, layout.sampled_rows_L)
        logp_RV = fuse(
            self._model.logits(hidden_ND, layout.lanes),
            layout.lanes_R,
            [sequence.weights for sequence in sampling],
            [sequence.request.rule for sequence in sampling],
        )
        drawn = draw(logp_RV, [sequence.sampler for sequence in sampling])
        self._layout, self._drawn_R = layout, drawn.tokens_R
        return drawn

    def warm_up(self) -> None:
        """Run one prefill and one decoding step of all members, to pay first-use costs now."""
        options = SamplingOptions(max_tokens=2)
        sequence = Sequence(
            request=GenerationRequest(
                request_id="warm-up", prompt_tokens=(0, 0), members=(), sampling=options
            ),
            members=tuple(range(self._num_members)),
            weights=(1 / self._num_members,) * self._num_members,
            tokens=[0, 0],
            max_new_tokens=2,
            sampler=SamplerState(options, None, random.Random(0)),
            text=TextStream(()),
            send=lambda outcome: None,  # noqa: ARG005 - nobody reads it
        )
        start = self.arena.allocate(sequence.num_rows)
        if start is None:
            return  # too small a cache for this; requests will be told
        sequence.region_start = start
        for num_tokens in (2, 1):
            self.step([Part(sequence=sequence, num_tokens=num_tokens)])
            sequence.num_cached += num_tokens
            sequence.tokens.append(0)
        self.arena.release(start, sequence.num_rows)
        self._layout = None

    def _layout_of(self, parts: Seq[Part]) -> Layout:
        layout = self._layout
        if (
            layout is not None
            and self._drawn_R is not None
            and layout.continues(parts)
            and layout.advance(self._drawn_R)
        ):
            return layout
        return build_layout(
            parts,
            num_members=self._num_members,
            row_bytes=self.arena.row_bytes // self.architecture.shape.num_layers,
            device=self._device,
        )
