"""Writes small GGUF files by the format's description (ggml, docs/gguf.md), version 3."""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> tuple[int, bytes]:
    """Type number and bytes: bool, 32-bit unsigned or float, string, or an array of these."""
    match value:
        case bool():
            return 7, struct.pack("<?", value)
        case int():
            return 4, struct.pack("<I", value)
        case float():
            return 6, struct.pack("<f", value)
        case str():
            return 8, _string(value)
    packed = [_value(entry) for entry in value]
    kind = 5 if packed[0][0] == 4 else packed[0][0]  # numbers in arrays are signed
    return 9, struct.pack("<IQ", kind, len(packed)) + b"".join(raw for _, raw in packed)


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, tuple[int, ...], int]],
) -> Path:
    """Write `metadata` and `tensors`: name -> (type number, dimensions, number of bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, raw = _value(value)
        head += _string(key) + struct.pack("<I", kind) + raw
    offset = 0
    for name, (kind, shape, num_bytes) in tensors.items():
        head += _string(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", kind, offset)
        offset += -(-num_bytes // 32) * 32
    path.write_bytes(head + b"\0" * (-len(head) % 32) + b"\0" * offset)
    return path
