"""Tiny random checkpoints of every architecture, engines over them, and small helpers."""

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as tokenizer_models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from models.card import read_card
from models.engines.base import Chunk, Engine, GenerationRequest, SamplingOptions
from models.engines.registry import create_engine
from models.engines.stacked.fusion import LaneWeights
from models.engines.stacked.sampler import SamplerState
from models.engines.stacked.sequence import Sequence as EngineSequence
from models.engines.text import TextStream
from models.spec import EngineSpec, Model, ModelSpec

VOCAB_SIZE = 320
CONTEXT_TOKENS = 256
END = 0

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": None, "head_dim": 24, "tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": False, "num_key_value_heads": 1},
    "llama3-rope": {
        "tie_word_embeddings": False,
        "num_key_value_heads": 4,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
}

_request_ids = itertools.count()


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE: `<|end|>` and `<|user|>` are special, every byte is a token, few merges."""
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|end|>", "<|user|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, the quick brown fox über 你好 123"] * 9, trainer)
    return tokenizer


def save_checkpoint(
    folder: Path,
    kind: str = "llama",
    *,
    seed: int = 0,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Save a random checkpoint with gains and biases that are not their initial ones."""
    options = {**ARCHITECTURES.get(kind, {}), **overrides}
    config = AutoConfig.for_model(
        kind.split("-", maxsplit=1)[0].removesuffix("3") if kind == "llama3-rope" else kind,
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT_TOKENS,
            "initializer_range": 0.15,
            "bos_token_id": None,
            "eos_token_id": END,
            "pad_token_id": None,
            **options,
        },
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    (folder / "tokenizer.json").write_text(build_tokenizer().to_str())
    return folder


def load_reference(folder: Path) -> PreTrainedModel:
    """The same checkpoint in transformers, float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def edit_config(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; `...` removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def build_engine(
    folders: Sequence[Path],
    *,
    kv_memory_bytes: int = 4 * 2**20,
    max_queued_requests: int = 64,
    dtype: Any = "auto",
    leads: Sequence[str] = (),
    **options: Any,
) -> Engine:
    """An engine whose members are named m0, m1, ...; the last of them may be another's `leads`."""
    spec = EngineSpec(
        name="tiny",
        kind="stacked",
        device="cpu",
        dtype=dtype,
        kv_memory_bytes=kv_memory_bytes,
        max_queued_requests=max_queued_requests,
        leads=tuple(leads),
        options={"num_threads": 1, **options},
    )
    return create_engine(
        spec,
        [
            Model(
                spec=ModelSpec(name=f"m{i}", engine="tiny", checkpoint=str(folder)),
                card=read_card(folder),
            )
            for i, folder in enumerate(folders)
        ],
    )


@asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[Engine]:
    """Start and stop."""
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def request(
    prompt: Sequence[int],
    members: Sequence[str] = ("m0",),
    *,
    weights: tuple[float, ...] | None = None,
    rule: Any = "mixture",
    client_id: str = "",
    **sampling: Any,
) -> GenerationRequest:
    """A request with a fresh id; greedy unless told."""
    return GenerationRequest(
        request_id=f"r{next(_request_ids)}",
        prompt_tokens=tuple(prompt),
        members=tuple(members),
        weights=weights,
        rule=rule,
        client_id=client_id,
        sampling=SamplingOptions(**{"temperature": 0.0, "max_tokens": 16, **sampling}),
    )


async def read(engine: Engine, wanted: GenerationRequest) -> list[Chunk]:
    """All chunks of one answer."""
    return [chunk async for chunk in engine.generate(wanted)]


def token_ids(chunks: Sequence[Chunk]) -> list[int]:
    """The tokens of an answer."""
    return [token.token_id for chunk in chunks for token in chunk.tokens]


def text_of(chunks: Sequence[Chunk]) -> str:
    """The text of an answer."""
    return "".join(chunk.text for chunk in chunks)


def answer(engine: Engine, *wanted: GenerationRequest) -> list[list[Chunk]]:
    """Start the engine, answer the requests at once, stop it."""

    async def run() -> list[list[Chunk]]:
        async with running(engine):
            return await asyncio.gather(*(read(engine, one) for one in wanted))

    return asyncio.run(run())


def make_sequence(tokens: Sequence[int], members: tuple[int, ...]) -> EngineSequence:
    """The engine's state of a request with room for 8 more tokens, not yet admitted."""
    return EngineSequence(
        request=GenerationRequest(request_id="r", prompt_tokens=tuple(tokens), members=()),
        members=members,
        weights=LaneWeights((1 / len(members),) * len(members)),
        lane_of=tuple(range(len(members))),
        end_tokens=frozenset({END}),
        tokens=list(tokens),
        max_new_tokens=8,
        sampler=SamplerState(SamplingOptions(), None, random.Random(0)),
        text=TextStream(()),
        send=lambda outcome: None,
    )
