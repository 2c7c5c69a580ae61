"""The tensors of a checkpoint folder, from the headers of its safetensors files alone.

Which files are read is transformers' rule: model.safetensors, else what the index names. Others
(companions of macOS, "consolidated" copies, adapters) are not looked at.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from models.errors import PoolError

# The files of a checkpoint folder that are data; TEMPLATES is a folder of more templates in it.
FOLDER_FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
)
TEMPLATES = "additional_chat_templates"

_SUFFIX = ".safetensors"
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """What a header says of one tensor. `dtype` is safetensors' name, as F32, BF16, F8_E4M3."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a checkpoint folder; `PoolError` names what is missing."""
    single, index = folder / _SINGLE, folder / _INDEX
    if single.is_file():
        return (single,)
    if not index.is_file():
        others = [file.name for file in folder.iterdir() if _is_of_weights(file)]
        found = f"; there is {', '.join(sorted(others))}" if others else ""
        raise PoolError(
            f"{folder} holds neither {_SINGLE} nor {_INDEX}; no other weights are read{found}"
        )
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise PoolError(f"{index}: weight_map must map tensors to files, got {names!r}")
    for name in names.values():
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix != _SUFFIX:
            raise PoolError(
                f"{index}: weight_map names {name!r}; allowed are {_SUFFIX} files of its folder"
            )
    files = tuple(sorted({folder / name for name in names.values()}))
    for file in files:
        if not file.is_file():
            raise PoolError(f"{file} is missing, though {index.name} names it; download it again")
    return files


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint folder by name.

    Raises `PoolError` for files that are damaged, cut off, or in each other's way.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise PoolError(f"{file}: the tensor {name} is also in {tensors[name].file.name}")
            tensors[name] = tensor
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; `PoolError` names the file and what is wrong with it."""
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        raise PoolError(
            f"{file} is missing; is {file.parent} a Hugging Face checkpoint folder?"
        ) from None
    except OSError as error:
        raise PoolError(f"{file} cannot be read: {error.strerror}") from None
    if raw.startswith(_POINTER):
        raise PoolError(f"{file} is a Git LFS pointer, not the file itself; run: git lfs pull")
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise PoolError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise PoolError(f"{file} does not hold a JSON object")
    return data


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return every tensor of one file by name; `PoolError` where it is damaged."""
    try:
        with file.open("rb") as stream:
            begins = stream.read(len(_POINTER))
    except OSError as error:
        raise PoolError(f"{file} cannot be read: {error.strerror}") from None
    if begins == _POINTER:
        raise PoolError(f"{file} is a Git LFS pointer, not the weights; run: git lfs pull")
    try:
        with safe_open(file, framework="numpy") as opened:
            return {
                name: StoredTensor(file=file, dtype=part.get_dtype(), shape=(*part.get_shape(),))
                for name in opened.keys()  # noqa: SIM118 - not a mapping
                for part in [opened.get_slice(name)]
            }
    except SafetensorError as error:
        raise PoolError(
            f"{file} is cut off or damaged, or no safetensors file: it has {file.stat().st_size} "
            f"bytes ({error})"
        ) from None


def _is_of_weights(file: Path) -> bool:
    return not file.name.startswith(".") and (
        file.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors")
        or any(suffix in file.name for suffix in (".incomplete", ".part", ".aria2"))
    )
