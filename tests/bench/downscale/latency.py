"""How long one token takes, by model shape: the inference-efficient law's other side.

Bian et al. 2025 rank shapes of equal size by predicted loss and *measured* latency: at equal size,
decoding takes longer the more layers run one after another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final, TypedDict

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from models.downscale.chunks import cut_out, load_model
from models.downscale.recipe import MemberShape
from models.downscale.shape import (
    CutShape,
    cut_config,
    shape_of,
    solve_shape,
)
from models.downscale.stage import Run, stage, write_json
from models.downscale.vocabulary import base_model
from models.errors import BaseError

LATENCY_FILE: Final = "latency.json"
_MOST_PARAMETERS: Final = 200_000_000
_PROMPT_TOKENS, _ROUNDS, _TOKENS_PER_ROUND = 16, 7, 16


class Timing(TypedDict):
    """One model's median time per token, greedy and alone, and its shape."""

    name: str
    num_layers: int
    hidden_size: int
    parameters: int
    ms_per_token: float


@dataclass(kw_only=True)
class _Decoding:
    """A model that decodes one token at a time for a single request."""

    model: PreTrainedModel
    cache: DynamicCache
    token: torch.Tensor

    def run(self, num_tokens: int) -> None:
        for _ in range(num_tokens):
            logits = self.model(
                input_ids=self.token, past_key_values=self.cache, use_cache=True
            ).logits
            self.token = logits[:, -1:].argmax(-1)


@torch.inference_mode()
def decode_ms(
    models: Mapping[str, PreTrainedModel],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median milliseconds per token of each model, in turns, so that load hits all alike."""
    decodings: dict[str, _Decoding] = {}
    for name, model in models.items():
        cache = DynamicCache(config=model.config)
        prompt = torch.ones(1, _PROMPT_TOKENS, dtype=torch.long)
        model(input_ids=prompt, past_key_values=cache, use_cache=True)
        decodings[name] = _Decoding(model=model, cache=cache, token=prompt[:, -1:])
    found: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(_ROUNDS):
        for name, decoding in decodings.items():
            begun_s = clock()
            decoding.run(_TOKENS_PER_ROUND)
            found[name].append(1000 * (clock() - begun_s) / _TOKENS_PER_ROUND)
    return {name: median(times) for name, times in found.items()}


@stage("latency")
def latency(run: Run, folder: Path) -> None:
    """Stage: the base, a chunk, and other shapes of the chunk's size."""
    chunk = load_model(cut_out(run, run.domains[0]))
    models = {"base": base_model(run)[0], "chunk": chunk}
    models |= _shapes_like(run, chunk.num_parameters())
    found = decode_ms(models)
    timings = [
        Timing(
            name=name,
            num_layers=shape_of(model.config).num_layers,
            hidden_size=shape_of(model.config).hidden_size,
            parameters=model.num_parameters(),
            ms_per_token=round(found[name], 4),
        )
        for name, model in models.items()
    ]
    write_json(folder / LATENCY_FILE, {"timings": timings})


def _shapes_like(run: Run, parameters: int) -> dict[str, PreTrainedModel]:
    """Untrained models of the same size, of a few depths; none where they would fill the memory."""
    config = base_model(run)[0].config
    found: dict[str, PreTrainedModel] = {}
    if parameters > _MOST_PARAMETERS:
        return found
    deepest = shape_of(config).num_layers
    for num_layers in sorted({max(1, round(deepest * i / 6)) for i in range(1, 7)}):
        try:
            shape = solve_shape(config, parameters, MemberShape(num_layers=num_layers))
        except BaseError:
            continue
        found[f"{num_layers} x {shape.hidden_size}"] = _untrained(run, shape)
    return found


def _untrained(run: Run, shape: CutShape) -> PreTrainedModel:
    config = cut_config(base_model(run)[0].config, shape, eps_scale=1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.recipe.seed)
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32
        )
    assert isinstance(model, PreTrainedModel)
    model.eval()  # type: ignore[no-untyped-call]
    return model
