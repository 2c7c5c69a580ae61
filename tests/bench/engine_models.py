"""Random checkpoints of the sizes that the engine is measured at, and engines over them.

Speed does not depend on what weights say, so none are downloaded or trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM

from models.card import read_card
from models.engines.base import Engine
from models.engines.registry import create_engine
from models.spec import EngineSpec, Model, ModelSpec

CONTEXT_TOKENS = 1024


@dataclass(frozen=True, kw_only=True)
class Size:
    """Shape of one model."""

    hidden_size: int
    num_layers: int
    feed_forward_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int


@dataclass(frozen=True, kw_only=True)
class School:
    """`num_members` models and one base of about as many parameters as all of them."""

    name: str
    member: Size
    num_members: int
    base: Size


# The shapes of the shipped pool.
SHIPPED = School(
    name="8 x 0.45 M",
    num_members=8,
    member=Size(
        hidden_size=128,
        num_layers=3,
        feed_forward_size=208,
        num_heads=4,
        num_kv_heads=2,
        head_size=32,
        vocab_size=512,
    ),
    base=Size(
        hidden_size=256,
        num_layers=6,
        feed_forward_size=512,
        num_heads=8,
        num_kv_heads=4,
        head_size=32,
        vocab_size=512,
    ),
)
# Larger: weights no longer fit the cores' caches. The base has the usual depth, members less.
LARGER = School(
    name="8 x 8 M",
    num_members=8,
    member=Size(
        hidden_size=384,
        num_layers=4,
        feed_forward_size=1024,
        num_heads=6,
        num_kv_heads=2,
        head_size=64,
        vocab_size=4096,
    ),
    base=Size(
        hidden_size=640,
        num_layers=12,
        feed_forward_size=1984,
        num_heads=10,
        num_kv_heads=5,
        head_size=64,
        vocab_size=4096,
    ),
)


def save_model(folder: Path, size: Size, *, seed: int) -> Path:
    """Save a random Llama with a byte tokenizer."""
    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        num_hidden_layers=size.num_layers,
        intermediate_size=size.feed_forward_size,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        head_dim=size.head_size,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(tokenizer_models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    return folder


def build_engine(folders: Sequence[Path]) -> Engine:
    """A stacked engine whose members are named by their folders."""
    return create_engine(
        EngineSpec(name="bench", kind="stacked", device="cpu", dtype="float32"),
        [
            Model(
                spec=ModelSpec(name=folder.name, engine="bench", checkpoint=folder.name),
                card=read_card(folder),
            )
            for folder in folders
        ],
    )


def weight_bytes(folders: Sequence[Path]) -> int:
    """Bytes of float32 weights that a token of all members reads (embeddings are tied)."""
    return sum(read_card(folder).parameters * 4 for folder in folders)
