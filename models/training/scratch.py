"""Models trained from nothing on generated tasks: their shapes, growth in depth, the training.

All are plain Llama checkpoints with tied embeddings and grouped-query attention.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from models.training.checkpoint import Progress
from models.training.data import Renderer, steps
from models.training.loop import Settings, run
from models.training.tokenizer import MAX_TOKENS

ROPE_THETA: Final = 10_000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaShape:
    """Width, depth and heads of one model."""

    hidden_size: int
    num_layers: int
    feed_forward_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int = 32


def build_model(
    shape: LlamaShape, tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> LlamaForCausalLM:
    """A freshly initialised fp32 model for `tokenizer`; the same for the same seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        intermediate_size=shape.feed_forward_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_size,
        max_position_embeddings=MAX_TOKENS,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)  # type: ignore[no-untyped-call]


@torch.no_grad()
def grow(shallow: LlamaForCausalLM, deep: LlamaForCausalLM) -> None:
    """Copy `shallow` into `deep`, which has a whole multiple of its layers; same function.

    The copied stack is repeated on top of itself (Du et al. 2024, "Stacking Your Transformers"),
    here with the repeats' output projections at zero, so that training goes on from the shallow
    model's loss.

    Raises:
        ValueError: the depths do not divide.
    """
    num_shallow, num_deep = len(shallow.model.layers), len(deep.model.layers)
    if num_deep % num_shallow:
        raise ValueError(f"{num_deep} layers are no multiple of {num_shallow}")
    deep.model.embed_tokens.load_state_dict(shallow.model.embed_tokens.state_dict())
    deep.model.norm.load_state_dict(shallow.model.norm.state_dict())
    for index, layer in enumerate(deep.model.layers):
        layer.load_state_dict(shallow.model.layers[index % num_shallow].state_dict())
        if index >= num_shallow:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()


def num_parameters(model: LlamaForCausalLM) -> int:
    """Distinct parameters; tied embeddings count once."""
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True, kw_only=True)
class TaskTraining(Settings):
    """Everything that the trained weights depend on, beside the model's own shape and seed.

    `mixture` gives each domain's share of the conversations.
    """

    mixture: Mapping[str, float]
    question_weight: float = 0.2
    seed: int = 0


def train(
    model: PreTrainedModel,
    renderer: Renderer,
    recipe: TaskTraining,
    *,
    folder: Path,
    resume: bool = False,
    deadline_s: float | None = None,
    checkpoint_every_s: float = 60.0,
    report: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
) -> Progress:
    """Train `model` in place on fresh tasks; see `models.training.loop.run`."""
    return run(
        model,
        lambda first_step: steps(
            renderer,
            recipe.mixture,
            seed=recipe.seed,
            first_step=first_step,
            rows_per_step=recipe.rows_per_step,
            row_tokens=recipe.row_tokens,
            question_weight=recipe.question_weight,
        ),
        recipe,
        asdict(replace(recipe, mixture=dict(recipe.mixture))),
        folder=folder,
        resume=resume,
        deadline_s=deadline_s,
        checkpoint_every_s=checkpoint_every_s,
        report=report,
        clock=clock,
    )
