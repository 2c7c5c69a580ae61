"""Adapters on vLLM: one per request, those of the pool and those that came later."""

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from models.adapter import read_adapter
from models.engines.base import GenerationRequest, SamplingOptions
from models.engines.registry import create_engine
from models.errors import RequestError
from models.pool import DEFAULT_POOL, Pool, load_pool
from models.tokenizer import load_tokenizer
from models.training.lora import LowRank, add_adapter, merge_adapter, save_adapter

BASE = DEFAULT_POOL / "arithmetic"
QUESTION = [{"role": "user", "content": "What is 37 + 58?"}]


def _load() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def _save_adapter(folder: Path, *, rank: int, seed: int) -> Path:
    model = _load()
    add_adapter(model, rank=rank, alpha=rank, seed=seed)
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LowRank):
            torch.nn.init.normal_(module.expand, std=0.3)
    save_adapter(model, folder, base=str(BASE))
    return folder


def _pool(folder: Path, adapter: Path) -> Pool:
    engine_args = {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 4, "max_loras": 3}
    engine = {
        "name": "e",
        "kind": "vllm",
        "dtype": "float32",
        "kv_memory_bytes": 64 * 2**20,
        "options": {"engine_args": engine_args, "num_threads": 1},
    }
    models = [
        {"name": "base", "engine": "e", "checkpoint": str(BASE)},
        {"name": "law", "base": "base", "adapter": str(adapter)},
    ]
    content = {"name": "vllm-adapters", "engines": [engine], "models": models}
    (folder / "pool.yaml").write_text(yaml.safe_dump(content))
    return load_pool(folder)


def test_each_request_has_its_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base, the pool's adapter and one that came later answer side by side as transformers does
    with the adapter merged; two at once in one answer are refused."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    law, later = (_save_adapter(tmp_path / n, rank=r, seed=r) for n, r in (("a", 5), ("b", 8)))
    pool = _pool(tmp_path, law)
    engine = create_engine(pool.engines[0], pool.models)
    prompt = load_tokenizer(pool.models[0]).encode_chat(QUESTION)
    origin = read_adapter(later, BASE).origin

    def wanted(*names: str) -> GenerationRequest:
        return GenerationRequest(
            request_id=f"r-{names}",
            prompt_tokens=prompt,
            members=names,
            sampling=SamplingOptions(max_tokens=12, temperature=0, ignore_eos=True),
        )

    async def read(request: GenerationRequest) -> list[int]:
        chunks = [chunk async for chunk in engine.generate(request)]
        return [token.token_id for chunk in chunks for token in chunk.tokens]

    async def ask() -> list[list[int]]:
        await engine.start()
        try:
            with pytest.raises(RequestError, match="cannot be fused"):
                await read(wanted("base", "law"))
            new = dataclasses.replace(wanted("new"), adapters={"new": origin})
            return await asyncio.gather(*map(read, (wanted("base"), wanted("law"), new)))
        finally:
            await engine.stop()

    answers = asyncio.run(ask())
    for folder, tokens in zip((None, law, later), answers, strict=True):
        reference = _load()
        if folder is not None:
            merge_adapter(reference, read_adapter(folder, BASE))
        reference.generation_config.eos_token_id = None
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert tokens == expected[0, len(prompt) :].tolist()
    assert len({tuple(tokens) for tokens in answers}) == 3
