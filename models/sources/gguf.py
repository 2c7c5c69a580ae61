"""A GGUF file: its facts, its tensors' names and sizes. Weights are not read.

The format is llama.cpp's (docs/gguf.md of ggml). Its own Python reader makes an array view of
every string, which takes seconds for a vocabulary of 50,000, so the header is read here.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from models.errors import PoolError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"  # of the tensors, in bytes

# Value types of the metadata: struct formats; 8 is a string and 9 an array.
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

# Tensor types: name, elements of a block, bytes of a block.
_TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
_MOST_DIMENSIONS = 4  # of a tensor, in ggml
_SCALINGS = ("none", "linear", "yarn", "longrope")  # of rotary positions
_PLAIN = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """The header of one file. `parameters` counts elements, whatever their type's bits."""

    path: Path
    metadata: dict[str, Any]
    tensors: frozenset[str]
    parameters: int
    quantization: str | None
    """The type that most elements have; None where all are floating-point numbers."""

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture; the prefix of its keys."""
        return str(self.metadata["general.architecture"])

    def value(self, key: str, default: int | None = None) -> int:
        """Return the architecture's `key`, a whole number; of one value per layer the largest.

        Raises `PoolError` where it is no such number, or is missing and `default` is None.
        """
        key = f"{self.architecture}.{key}"
        found = self.metadata.get(key, default)
        if found is None:
            raise PoolError(f"{self.path}: the key {key} is missing")
        of_layers = found if isinstance(found, list) else [found]
        if not of_layers or not all(type(one) is int and 0 <= one < 2**31 for one in of_layers):
            raise PoolError(
                f"{self.path}: {key} {found!r} is not allowed; a whole number below 2^31 is"
            )
        largest: int = max(of_layers)
        return largest

    def check_runs(self) -> None:
        """Raise `PoolError` for what ends the process of llama.cpp, instead of being refused there.

        Tokens of one text, and a scaling of positions that it does not know.
        """
        times = Counter(filter(None, self.tokens()))
        token, most = times.most_common(1)[0] if times else ("", 1)
        if most > 1:
            raise PoolError(f"{self.path}: tokenizer.ggml.tokens has {token!r} {most} times")
        key = f"{self.architecture}.rope.scaling.type"
        scaling = self.metadata.get(key, "none")
        if scaling not in _SCALINGS:
            raise PoolError(
                f"{self.path}: {key} {scaling!r} is unknown; allowed are {', '.join(_SCALINGS)}"
            )

    def end_tokens(self) -> frozenset[int]:
        """Return the tokens that end a text, a turn or a message."""
        ends = (self.token_id(name) for name in ("eos", "eot", "eom"))
        return frozenset(end for end in ends if end is not None)

    def special_tokens(self) -> dict[str, str]:
        """Return the texts of the special tokens by the names that templates use."""
        tokens = self.tokens()
        # Older files of BERTs have a cls in place of a bos.
        names = {"cls": "bos", "bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
        return {
            f"{name}_token": tokens[index]
            for key, name in names.items()
            if (index := self.token_id(key)) is not None
        }

    def token_id(self, name: str) -> int | None:
        """Return the id of the token that has this role; None if none has.

        Ids that the vocabulary lacks count for nothing, as in llama.cpp.
        """
        index = self.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return index if type(index) is int and 0 <= index < len(self.tokens()) else None

    def tokens(self) -> list[str]:
        """Return the texts of all tokens; raises `PoolError` where the file has none."""
        return self.texts("tokenizer.ggml.tokens")

    def texts(self, key: str) -> list[str]:
        """Return the list of texts at `key`; raises `PoolError` where there is none."""
        found = self.metadata.get(key)
        if not isinstance(found, list) or not found or not isinstance(found[0], str):
            raise PoolError(f"{self.path}: the key {key} is missing, or is no list of texts")
        return found


def read_gguf(path: Path) -> GgufFile:
    """Read the header of `path`; raises `PoolError` that says what is wrong with the file."""
    try:
        with path.open("rb") as stream:
            return _read(path, stream)
    except OSError as error:
        raise PoolError(f"{path} cannot be read: {error.strerror}") from None
    except (
        *(struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError),
        RecursionError,  # arrays within arrays
    ):
        raise PoolError(f"{path} is damaged or cut off: its header cannot be read") from None


def _read(path: Path, stream: BinaryIO) -> GgufFile:
    head = stream.read(4)
    if head != _MAGIC:
        pointer = "; it is a Git LFS pointer, not the file itself" if head == b"vers" else ""
        raise PoolError(f"{path} is no GGUF file{pointer}")
    (version,) = _unpack(stream, "I")
    if version not in _VERSIONS:
        raise PoolError(
            f"{path}: GGUF version {version} is not read (nor are big-endian files); allowed are "
            f"{', '.join(map(str, _VERSIONS))}"
        )
    num_tensors, num_values = _unpack(stream, "QQ")
    metadata = {}
    for _ in range(num_values):
        key = _read_string(stream)
        metadata[key] = _read_value(stream, *_unpack(stream, "I"))
    architecture, sort = (metadata.get(f"general.{key}") for key in ("architecture", "type"))
    if sort not in (None, "model"):
        raise PoolError(
            f"{path}: general.type {sort!r} is not served; allowed is model, or none. Adapters are "
            "read as folders that PEFT wrote"
        )
    if not isinstance(architecture, str) or not architecture:
        raise PoolError(f"{path}: general.architecture {architecture!r} is not the name of one")
    split, alignment = (metadata.get(k, v) for k, v in (("split.count", 1), (_ALIGNMENT, 32)))
    for key, value, least in (("split.count", split, 0), (_ALIGNMENT, alignment, 1)):
        if type(value) is not int or value < least:
            raise PoolError(f"{path}: {key} {value!r} is not allowed; a number from {least} on is")
    if split > 1:
        raise PoolError(f"{path} is one of {split} parts; join them with llama-gguf-split --merge")
    num_elements: Counter[str] = Counter()
    names = set()
    end = 0
    for _ in range(num_tensors):
        names.add(_read_string(stream))
        (num_dimensions,) = _unpack(stream, "I")
        if num_dimensions > _MOST_DIMENSIONS:  # before so many are read
            raise struct.error
        size = math.prod(_unpack(stream, "Q" * num_dimensions))
        kind, offset = _unpack(stream, "IQ")
        name, elements, num_bytes = _TENSOR_TYPES.get(kind, (f"type {kind}", 1, 0))
        num_elements[name] += size
        end = max(end, offset + size // elements * num_bytes)
    start = -(-stream.tell() // alignment) * alignment
    length = path.stat().st_size
    if length < start + end:
        raise PoolError(f"{path} is cut off: it has {length} bytes, its header names {start + end}")
    packed = [(count, name) for name, count in num_elements.items() if name not in _PLAIN]
    return GgufFile(
        path=path,
        metadata=metadata,
        tensors=frozenset(names),
        parameters=num_elements.total(),
        quantization=max(packed)[1] if packed else None,
    )


def _unpack(stream: BinaryIO, form: str) -> tuple[Any, ...]:
    form = "<" + form
    return struct.unpack(form, stream.read(struct.calcsize(form)))


def _read_string(stream: BinaryIO) -> str:
    (length,) = _unpack(stream, "Q")
    raw = stream.read(length)
    if len(raw) < length:
        raise struct.error
    return raw.decode()


def _read_value(stream: BinaryIO, kind: int) -> Any:  # noqa: ANN401 - as the file has it
    if kind == _STRING:
        return _read_string(stream)
    if kind != _ARRAY:
        return _unpack(stream, _NUMBERS[kind])[0]
    kind, length = _unpack(stream, "IQ")
    if kind in (_STRING, _ARRAY):
        return [_read_value(stream, kind) for _ in range(length)]
    return list(_unpack(stream, f"{length}{_NUMBERS[kind]}"))
