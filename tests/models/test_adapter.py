"""What an adapter's files say is held against its base, and the rest refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from models.adapter import read_adapter
from models.errors import PoolError
from models.pool import load_pool
from tests.models.engines.stacked.adapters import save_adapter, write_pool
from tests.models.engines.stacked.tiny import save_checkpoint

A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(name="base", scope="module")
def saved_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint."""
    return save_checkpoint(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(name="adapter")
def saved_adapter(base: Path, tmp_path: Path) -> Path:
    """An adapter of it."""
    return save_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "up_proj"])


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of adapter_config.json."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_it_says_what_it_is(base: Path, adapter: Path) -> None:
    """Modules with their scales, the rank, the size; the hash follows the content."""
    found = read_adapter(adapter, base)
    assert set(found.scales) == {
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.q_proj", "mlp.up_proj")
    }
    assert set(found.scales.values()) == {2.0}
    assert found.largest_rank == 4
    assert found.parameters == 2 * 4 * (64 + 64 + 64 + 96)
    edit(adapter, lora_alpha=16)
    changed = read_adapter(adapter, base)
    assert changed.origin != found.origin and set(changed.scales.values()) == {4.0}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported; allowed are 'LORA'"),
        ({"use_dora": True}, "use_dora True is not supported"),
        ({"bias": "all"}, "bias 'all' is not supported; allowed are 'none'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\] is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"something_of_tomorrow": 1}, "something_of_tomorrow 1 is not supported; leave it out"),
        ({"r": 0}, "the rank 0 of .* is not allowed"),
        ({"r": 5}, r"has the shape \[4, 64\], but adapter_config.json gives .* the rank 5"),
        ({"lora_alpha": "8"}, "lora_alpha '8' of .* is not allowed; a number is"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan of .* is not allowed"),
        ({"lora_alpha": float("inf")}, "lora_alpha inf of .* is not allowed"),
        ({"rank_pattern": {"(": 4}}, r"rank_pattern .* is no regular expression"),
        ({"target_modules": ["q_proj"]}, r"up_proj is adapted, but is none of .* \['q_proj'\]"),
        ({"target_modules": ["q_proj", "up_proj", "k_proj"]}, "k_proj.lora_A.weight is missing"),
        *(
            ({"layers_to_transform": [0, 1], "layers_pattern": value}, f"layers_pattern .*{why}")
            for value, why in [
                (1, "is not allowed"),
                ({"layers": 1}, "is not allowed"),
                (["layers", None], "is not allowed"),
                ("[", "is no regular expression"),
                (["["], "is no regular expression"),
            ]
        ),
        (
            {"layers_to_transform": "01"},
            "layers_to_transform .01. is not allowed",
        ),
        ({"target_modules": 7}, "target_modules 7 is not allowed; a list of modules or a regular"),
    ],
)
def test_what_is_not_computed_is_refused(
    base: Path, adapter: Path, changes: dict[str, Any], told: str
) -> None:
    """By file, key, value, and what is allowed."""
    edit(adapter, **changes)
    with pytest.raises(PoolError, match=told) as refused:
        read_adapter(adapter, base)
    assert str(adapter) in str(refused.value)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"base_model.model.lm_head.weight": torch.zeros(2, 2)}, "lm_head.weight is not supported"),
        ({A.replace("q_proj", "k_proj"): torch.zeros(4, 64)}, "k_proj.lora_B.weight is missing"),
        ({A: torch.zeros(4, 32)}, r"make a matrix of \[64, 32\], but the base's is \[64, 64\]"),
        ({A: torch.zeros(4, 64, dtype=torch.int8)}, "is of type I8; allowed are F32, F16, BF16"),
        (
            {
                A.replace("model.layers.0.self_attn.q_proj", "lm_head").replace("_A", side): zeros
                for side, zeros in (("_A", torch.zeros(4, 64)), ("_B", torch.zeros(320, 4)))
            },
            "lm_head is adapted, which is no matrix of a layer of the base; allowed are mlp.down",
        ),
    ],
)
def test_tensors_are_held_against_the_base(
    base: Path, adapter: Path, tensors: dict[str, torch.Tensor], told: str
) -> None:
    """Those that are missing, of another shape or type, or of what no layer has."""
    file = adapter / "adapter_model.safetensors"
    save_file({**load_file(file), **tensors}, file)
    with pytest.raises(PoolError, match=told):
        read_adapter(adapter, base)


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"base": "nobody"}, "base: 'nobody' is unknown; allowed are base, law"),
        ({"adapter": ...}, "models.law.adapter: the key is missing; an adapter needs it"),
        ({"checkpoint": "x"}, "models.law.checkpoint: an adapter has its base's; remove it"),
        ({"base": "law"}, "models.law.base: 'law' is no model with a folder of safetensors"),
        ({"engine": "other"}, "an adapter runs where its base does, on e"),
        ({"adapter": "./nowhere"}, "models.law.adapter: there is no folder"),
    ],
)
def test_a_pool_names_what_is_wrong(
    base: Path, adapter: Path, tmp_path: Path, model: dict[str, Any], told: str
) -> None:
    """The model, the key, and what is allowed."""
    write_pool(tmp_path, base, {"law": adapter})
    file = tmp_path / "pool.yaml"
    content = yaml.safe_load(file.read_text())
    content["engines"].append({"name": "other", "kind": "fake"})
    content["models"].append({"name": "f", "engine": "other"})
    changed = {**content["models"][1], "engine": "e", **model}
    content["models"][1] = {key: value for key, value in changed.items() if value is not ...}
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(PoolError, match=told):
        load_pool(tmp_path)


def test_an_adapter_is_as_its_base_where_it_does_not_say(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Engine, system message, sampling and price are the base's; its own win."""
    write_pool(tmp_path, base, {"law": adapter, "tax": adapter})
    file = tmp_path / "pool.yaml"
    content = yaml.safe_load(file.read_text())
    content["models"][0] |= {"system": "Be brief.", "usd_per_million_input_tokens": 2}
    content["models"][2] |= {"system": "Be a lawyer."}
    file.write_text(yaml.safe_dump(content))
    _, law, tax = load_pool(tmp_path).models
    assert (law.spec.engine, law.spec.system, tax.spec.system) == ("e", "Be brief.", "Be a lawyer.")
    assert law.spec.usd_per_million_input_tokens == 2
    assert law.facts().parameters == load_pool(tmp_path).models[0].facts().parameters + 2 * 4 * 288


def test_an_engine_that_runs_no_adapters_says_who_does(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """By the model's key."""
    write_pool(tmp_path, base, {"law": adapter})
    file = tmp_path / "pool.yaml"
    file.write_text(file.read_text().replace("kind: stacked", "kind: encoder"))
    with pytest.raises(PoolError, match=r"models.law.adapter: .* engines of kind stacked, vllm do"):
        load_pool(tmp_path)
