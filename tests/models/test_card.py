"""A checkpoint that is damaged, unfinished or quantized is refused by name before anything runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.card import read_card
from models.engines.registry import engine_traits
from models.errors import PoolError
from models.spec import EngineSpec, Model, ModelSpec
from tests.models.engines.stacked.tiny import edit_config, save_checkpoint

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"


def change(name: str, content: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Replace the content of a file, which may not be there."""

    def apply(folder: Path) -> None:
        file = folder / name
        file.write_bytes(content(file.read_bytes() if file.exists() else b""))

    return apply


def header(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Edit the header of model.safetensors, and leave its data."""

    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        raw = file.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        facts = json.loads(raw[8 : 8 + size])
        edited = json.dumps(edit(facts) or facts).encode()
        file.write_bytes(len(edited).to_bytes(8, "little") + edited + raw[8 + size :])

    return apply


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "pointer": (
        change("model.safetensors", lambda b: POINTER),
        r"safetensors is a Git LFS pointer",
    ),
    "cut off": (
        change("model.safetensors", lambda b: b[:-9]),
        r"safetensors is cut off or damaged",
    ),
    "cut off in its header": (
        change("model.safetensors", lambda b: b[:99]),
        r"safetensors is cut off .*invalid header length",
    ),
    "empty": (change("model.safetensors", lambda b: b""), r"model\.safetensors is cut off or"),
    "too long": (change("model.safetensors", lambda b: b + b"\0"), "not fully covered"),
    "no header": (
        change("model.safetensors", lambda b: b[:8] + b"x" * (len(b) - 8)),
        "invalid UTF-8|invalid JSON|header too large",
    ),
    "another size": (
        header(lambda facts: facts["model.norm.weight"].update(shape=[63])),
        "invalid shape, data type, or offset",
    ),
    "overlapping": (
        header(lambda facts: facts["model.norm.weight"].update(data_offsets=[0, 256])),
        "invalid offset for tensor",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "a pickle": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"there is pytorch_model\.bin",
    ),
    "unfinished": (
        lambda f: (f / "model.safetensors").rename(f / "model.safetensors.incomplete"),
        r"there is model\.safetensors\.incomplete",
    ),
    "tokenizer pointer": (change("tokenizer.json", lambda b: POINTER), r"tokenizer\.json is a Git"),
    "tokenizer cut off": (
        change("tokenizer.json", lambda b: b[:50]),
        r"tokenizer\.json is not valid",
    ),
    "config pointer": (change("config.json", lambda b: POINTER), r"config\.json is a Git LFS"),
    "config of bytes": (change("config.json", lambda b: b"\xff\xfe"), r"config\.json is not valid"),
    "generation": (
        change("generation_config.json", lambda b: b"{oops"),
        r"generation_config\.json",
    ),
    "tokenizer config": (
        change("tokenizer_config.json", lambda b: b"["),
        r"tokenizer_config\.json",
    ),
    "null layers": (lambda f: edit_config(f, num_hidden_layers=None), "num_hidden_layers None"),
    "no layers": (
        lambda f: edit_config(f, num_hidden_layers=0),
        "num_hidden_layers 0 is not allowed",
    ),
    "no hidden size": (
        lambda f: edit_config(f, hidden_size=...),
        "the key 'hidden_size' is missing",
    ),
    "null heads": (lambda f: edit_config(f, num_attention_heads=None), "num_attention_heads None"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files_are_named(case: str, tmp_path: Path) -> None:
    """The file and what is wrong with it, whichever it is."""
    damage, message = DAMAGE[case]
    folder = save_checkpoint(tmp_path)
    damage(folder)
    with pytest.raises(PoolError, match=message):
        read_card(folder)


def test_shards_that_are_missing_or_double_are_named(tmp_path: Path) -> None:
    """The index tells which files there must be; no tensor may be in two of them."""
    folder = save_checkpoint(tmp_path, max_shard_size="40KB")
    first, *_, last = sorted(folder.glob("model-*.safetensors"))
    kept = last.read_bytes()
    last.write_bytes(first.read_bytes())
    with pytest.raises(PoolError, match=rf"{last.name}: the tensor \S+ is also in {first.name}"):
        read_card(folder)
    last.write_bytes(kept)
    first.unlink()
    with pytest.raises(PoolError, match=rf"{first.name} is missing, though .*index\.json names it"):
        read_card(folder)
    for name in ("../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "x.bin", "", None):
        index = {"weight_map": {"lm_head.weight": name}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(PoolError, match=rf"index\.json: weight_map names {name!r}; allowed"):
            read_card(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(PoolError, match="weight_map must map tensors to files"):
        read_card(folder)


def scaled(dtype: torch.dtype, suffix: str) -> Callable[[str, torch.Tensor], dict[str, Any]]:
    """Weights of another type, with a scale beside each."""

    def quantize(name: str, weight: torch.Tensor) -> dict[str, Any]:
        packed = (weight * 100).to(dtype)
        return {name: packed, name.removesuffix("weight") + suffix: torch.ones(1)}

    return quantize


def packed(name: str, weight: torch.Tensor) -> dict[str, Any]:
    """GPTQ's and AWQ's tensors."""
    stem = name.removesuffix("weight")
    return {
        f"{stem}qweight": torch.zeros(8, weight.shape[0], dtype=torch.int32),
        f"{stem}scales": torch.ones(1, weight.shape[0]),
    }


QUANTIZED: dict[str, tuple[Any, dict[str, Any], str | None]] = {
    "fp8": (scaled(torch.float8_e4m3fn, "weight_scale"), {}, None),
    "fp8, other": (scaled(torch.float8_e5m2, "weight_scale_inv"), {}, None),
    "fp8, said": (
        scaled(torch.float8_e4m3fn, "weight_scale"),
        {"quantization_config": {"quant_method": "fbgemm_fp8"}},
        "fbgemm_fp8",
    ),
    "int8": (scaled(torch.int8, "SCB"), {"quantization_config": {"load_in_8bit": True}}, None),
    "int8, not said": (scaled(torch.int8, "weight_scale"), {}, None),
    "int8 in floats": (scaled(torch.bfloat16, "weight_scale"), {}, "with scales of its own"),
    "gptq": (packed, {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    "awq, not said": (packed, {}, None),
    "nf4": (scaled(torch.uint8, "weight.quant_state.bitsandbytes__nf4"), {}, None),
    "nf4's table": (scaled(torch.bfloat16, "weight.absmax"), {}, "with scales of its own"),
    "mlx": (scaled(torch.uint8, "biases"), {"quantization": {"bits": 4}}, "quantization"),
    "compressed": (
        None,
        {"compression_config": {"format": "pack-quantized"}},
        "compression_config",
    ),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_quantized_weights_are_named(case: str, tmp_path: Path) -> None:
    """However it is told or not told: the card says so, and the stacked engine refuses them."""
    quantize, config, named = QUANTIZED[case]
    folder = save_checkpoint(tmp_path, attention_bias=False)
    edit_config(folder, **config)
    if quantize is not None:
        tensors: dict[str, torch.Tensor] = {}
        for name, weight in load_file(folder / "model.safetensors").items():
            tensors |= quantize(name, weight) if "_proj.weight" in name else {name: weight}
        save_file(tensors, folder / "model.safetensors")
    card = read_card(folder)
    assert card.quantization is not None
    assert named is None or named in card.quantization
    spec = EngineSpec(name="e", kind="stacked")
    model = Model(spec=ModelSpec(name="m", engine="e", checkpoint=str(folder)), card=card)
    with pytest.raises(PoolError, match="the weights are quantized: "):
        engine_traits(spec, [model])


def test_a_file_that_tells_of_quantization_counts(tmp_path: Path) -> None:
    """Some tools say it in a file of their own and not in config.json."""
    folder = save_checkpoint(tmp_path)
    assert read_card(folder).quantization is None
    (folder / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    assert read_card(folder).quantization == "by hf_quant_config.json"
