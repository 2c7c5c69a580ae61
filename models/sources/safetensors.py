"""The tensors of a checkpoint folder, from the headers of its safetensors files alone.

Which files are read is transformers' rule: model.safetensors, else what the index names. Others
(companions of macOS, "consolidated" copies, adapters) are not looked at.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}


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
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        if (head + stream.read(len(_POINTER))).startswith(_POINTER):
            raise PoolError(f"{file} is a Git LFS pointer, not the weights; run: git lfs pull")
        header_bytes = int.from_bytes(head, "little")
        if size < 8 or header_bytes > size - 8:
            raise PoolError(
                f"{file} is cut off or no safetensors file: it has {size} bytes, which end within "
                "its header"
            )
        stream.seek(8)
        raw = stream.read(header_bytes)
    try:
        header = json.loads(raw)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans = {
            name: (int(entry["data_offsets"][0]), int(entry["data_offsets"][1]))
            for name, entry in entries.items()
        }
        tensors = {
            name: StoredTensor(
                file=file,
                dtype=str(entry["dtype"]),
                shape=tuple(int(length) for length in entry["shape"]),
            )
            for name, entry in entries.items()
        }
        for name, tensor in tensors.items():
            num_bytes = spans[name][1] - spans[name][0]
            if num_bytes != math.prod(tensor.shape) * _BYTES.get(tensor.dtype, 0) != 0:
                raise ValueError(f"{name} has {num_bytes} bytes")
        num_bytes = 0
        for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
            if begin != num_bytes:
                raise ValueError(
                    f"{name} begins at {begin}, what stands before ends at {num_bytes}"
                )
            num_bytes = end
    except (LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise PoolError(f"{file} is no safetensors file: its header is damaged ({error})") from None
    named = 8 + header_bytes + num_bytes
    if size != named:
        raise PoolError(
            f"{file} is cut off or damaged: it has {size} bytes, its header names {named}"
        )
    return tensors


def _is_of_weights(file: Path) -> bool:
    return not file.name.startswith(".") and (
        file.suffix in (".bin", ".pt", ".pth", ".gguf", ".safetensors")
        or any(suffix in file.name for suffix in (".incomplete", ".part", ".aria2"))
    )
