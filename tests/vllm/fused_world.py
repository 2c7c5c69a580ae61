"""Tiny random ensembles, vLLM engines over them in this process, and what their answers must be."""

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo

from models.card import read_card
from models.engines.vllm_fused.folder import write_folder
from tests.models.engines.stacked.tiny import load_reference, save_checkpoint

MAX_TOKENS = 12
# A prompt longer than this is computed in several steps.
STEP_TOKENS = 64
# vLLM's attention on CPU wants heads of a multiple of 32.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 128, "head_dim": 32},
    "llama3-rope": {"hidden_size": 128, "head_dim": 32},
    # Not a multiple of 32: no packed weights on CPU, or padded ones.
    "mistral": {"head_dim": 32, "hidden_size": 48},
    "qwen2": {"hidden_size": 128, "intermediate_size": 80},
    "qwen3": {},
}


@dataclass(frozen=True, kw_only=True)
class World:
    """Members' folders, in order, and the folder that fuses them."""

    members: list[Path]
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Ask:
    """A prompt and how to fuse; weights None is the default."""

    prompt: list[int]
    weights: list[float] | None = None
    rule: str = "mixture"

    @property
    def extra_args(self) -> dict[str, Any] | None:
        """The same in vLLM's terms."""
        if self.weights is None:
            return None
        return {"shoal_weights": self.weights, "shoal_rule": self.rule}


def make_world(tmp_path: Path, kind: str, num_members: int) -> World:
    """Save random members of `kind` and stack them."""
    members = [
        save_checkpoint(tmp_path / f"m{i}", kind, seed=i, **SHAPES[kind])
        for i in range(num_members)
    ]
    for folder in members:
        (folder / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}'
        )
    write_folder({folder.name: read_card(folder) for folder in members}, tmp_path / "fused")
    return World(members=members, folder=tmp_path / "fused")


@contextmanager
def vllm_engine(folder: Path, **options: Any) -> Iterator[Any]:
    """vLLM's `LLM` in this process, which it leaves as it was; may be nested."""
    with (
        patch.dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0"),
        # vLLM compiles a helper of its log-probabilities even if it is to be eager.
        torch._dynamo.config.patch(disable=True),
    ):
        yield from _llm(folder, options)


def _llm(folder: Path, options: dict[str, Any]) -> Iterator[Any]:
    import vllm
    from vllm.distributed import cleanup_dist_env_and_memory

    torch.set_num_threads(1)
    llm = vllm.LLM(
        str(folder),
        **{
            "dtype": "float32",
            "enforce_eager": True,
            "enable_prefix_caching": True,
            "max_model_len": 256,
            "max_num_seqs": 32,
            "kv_cache_memory_bytes": 32 * 2**20,
            "max_num_batched_tokens": STEP_TOKENS,
            **options,
        },
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        torch.set_flush_denormal(False)


def generate(llm: Any, asks: Sequence[Ask], **sampling: Any) -> list[Any]:
    """Answer all at once, greedily unless told otherwise; vLLM's outputs."""
    from vllm import SamplingParams

    options = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True, **sampling}
    return llm.generate(
        [{"prompt_token_ids": ask.prompt} for ask in asks],
        [SamplingParams(**options, extra_args=ask.extra_args) for ask in asks],
        use_tqdm=False,
    )


def token_ids(outputs: Sequence[Any]) -> list[list[int]]:
    """The tokens of each answer."""
    return [list(output.outputs[0].token_ids) for output in outputs]


def random_prompt(rng: random.Random, num_tokens: int) -> list[int]:
    """Token ids of no special token."""
    return [rng.randrange(2, 300) for _ in range(num_tokens)]


class Reference:
    """Transformers, one member after another, and the fusion rules as the papers have them."""

    def __init__(self, world: World) -> None:
        self._models = [load_reference(folder) for folder in world.members]

    def logp_MTV(self, tokens: Sequence[int]) -> torch.Tensor:  # noqa: N802
        """Every member's next-token log-probabilities after each token."""
        with torch.inference_mode():
            ids = torch.tensor([list(tokens)])
            return torch.stack([m(ids).logits[0].log_softmax(-1) for m in self._models])

    def fuse(self, logp_MV: torch.Tensor, weights: Sequence[float], rule: str) -> torch.Tensor:
        """Fused log-probabilities of one position."""
        weights_M1 = torch.tensor(weights, dtype=torch.float64)[:, None]
        weights_M1 /= weights_M1.sum()
        if rule == "product":
            return (weights_M1 * logp_MV).sum(0).log_softmax(-1)
        return (weights_M1.log() + logp_MV).logsumexp(0)

    def answer(self, ask: Ask) -> list[int]:
        """The greedy answer."""
        tokens = list(ask.prompt)
        for _ in range(MAX_TOKENS):
            logp_MV = self.logp_MTV(tokens)[:, -1]
            weights = ask.weights or [1.0] * len(self._models)
            tokens.append(int(self.fuse(logp_MV, weights, ask.rule).argmax()))
        return tokens[len(ask.prompt) :]
