"""Tiny random checkpoints of every supported architecture, and a recipe on one."""

import json

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from models.downscale.pipeline import downscale
from models.downscale.recipe import Recipe
from models.training.data import Conversation
from models.training.scratch import build_model, build_tokenizer
from models.training.settings import BaseShape

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
}


def tiny_model(architecture: str, *, tied: bool = True, seed: int = 0) -> PreTrainedModel:
    """4 layers of 64 channels, 8 heads of 8 in 4 groups; biases and norms random, not trivial."""
    head_dim = {} if architecture == "qwen2" else {"head_dim": 8}
    config = _CONFIGS[architecture](
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        **head_dim,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_conversations(count: int = 12, *, seed: int = 0) -> list[Conversation]:
    """Random tokens of uneven lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (count,), generator=generator).tolist()
    return [
        Conversation(
            tokens=torch.randint(1, 96, (length,), generator=generator).tolist(),
            is_answer=[False] * (length // 2) + [True] * (length - length // 2),
        )
        for length in lengths
    ]


TINY = BaseShape(hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8)


def tiny_base(folder):
    """Write an untrained base with its tokenizer into `folder`, and return that."""
    tokenizer = build_tokenizer()
    build_model(TINY, 2, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_recipe(tmp_path):
    """A recipe on an untrained base and two files, small enough for seconds."""
    base = tiny_base(tmp_path / "checkpoint")
    for name in ("sums", "words"):
        lines = [{"question": f"{name} {i} + 1?", "answer": str(i + 1)} for i in range(120)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Recipe.model_validate(
        {
            "name": "tiny",
            "base": {"checkpoint": str(base)},
            "domains": {
                name: {"corpus": str(tmp_path / f"{name}.jsonl")} for name in ("sums", "words")
            },
            "members": {"parameters": "1/2"},
            "cut": {"calibration_examples": 8},
            "adapt": {
                "tokens": 2_000, "rows_per_step": 4, "row_tokens": 32, "general_share": 0.2,
                "compiled": False, "precision": "float32",
            },
        }
    )  # fmt: skip


def run(recipe, out, *, resume=False):
    """Run the pipeline quietly; returns its report, line by line."""
    lines = []
    downscale(recipe, out, resume=resume, report=lines.append)
    return lines
