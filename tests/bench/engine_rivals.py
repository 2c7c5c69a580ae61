"""The same checkpoints in transformers: what the engine is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig


def load(folder: Path) -> Any:
    """A model in float32 that never meets an end token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def generate(model: Any, prompts: Sequence[Sequence[int]], num_tokens: int) -> None:
    """Batched `generate`, greedy; prompts of one length."""
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
        )


def generate_continuously(model: Any, prompts: Sequence[Sequence[int]], num_tokens: int) -> None:
    """Its continuous batching, greedy."""
    config = GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    # Sized for this load; its own sizing takes most of the free memory.
    sizes = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=1024)
    outputs = model.generate_batch(
        [list(prompt) for prompt in prompts],
        generation_config=config,
        continuous_batching_config=sizes,
        warmup=False,
    )
    lengths = {len(output.generated_tokens) for output in outputs.values()}
    if lengths != {num_tokens} or len(outputs) != len(prompts):
        raise RuntimeError(f"generate_batch returned {len(outputs)} answers of {lengths} tokens")


def generate_averaged(models: Sequence[Any], prompt: Sequence[int], num_tokens: int) -> None:
    """All models one after another with cached decoding, probabilities averaged at every token.

    What GaC (Yu et al. 2024) does for models of one vocabulary.
    """
    with torch.inference_mode():
        ids, caches = torch.tensor([prompt]), [None] * len(models)
        for _ in range(num_tokens):
            total: Any = 0
            for i, model in enumerate(models):
                output = model(ids, past_key_values=caches[i], use_cache=True, logits_to_keep=1)
                caches[i] = output.past_key_values
                total = total + output.logits[:, -1].softmax(-1)
            ids = total.argmax(-1)[:, None]
