"""Random adapters as PEFT writes them, pools of them, and PEFT's own answers to compare with."""

from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from models.engines.base import Engine
from models.engines.registry import create_engine
from models.pool import Pool, load_pool
from tests.models.engines.stacked.tiny import load_reference

ALL = "all-linear"


def save_adapter(folder: Path, base: Path, *, seed: int = 0, **config: Any) -> Path:
    """Save an adapter of `base` whose factors are random; `config` is PEFT's."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **config}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = get_peft_model(load_reference(base), LoraConfig(**settings))
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    return folder


def write_pool(folder: Path, base: Path, adapters: dict[str, Path], **engine: Any) -> Pool:
    """A pool of the model `base` and its adapters, in one stacked engine."""
    spec = {
        "name": "e",
        "kind": "stacked",
        "device": "cpu",
        "kv_memory_bytes": 4 * 2**20,
        **engine,
        "options": {"num_threads": 1, **engine.get("options", {})},
    }
    models = [
        {"name": "base", "engine": "e", "checkpoint": str(base)},
        *({"name": n, "base": "base", "adapter": str(path)} for n, path in adapters.items()),
    ]
    folder.mkdir(exist_ok=True)
    content = {"name": "adapters", "engines": [spec], "models": models}
    (folder / "pool.yaml").write_text(yaml.safe_dump(content))
    return load_pool(folder)


def build(pool: Pool) -> Engine:
    """The pool's engine, not started."""
    return create_engine(pool.engines[0], pool.models)


def peft_logits(base: Path, adapter: Path | None, tokens: list[int]) -> Tensor:
    """What PEFT and transformers compute, [T, V], float32."""
    model = load_reference(base)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).eval()
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits
