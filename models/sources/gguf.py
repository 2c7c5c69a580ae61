"""A GGUF file: its facts, its tensors' names and sizes, its tokenizer. Weights are not read.

The format is llama.cpp's (docs/gguf.md of ggml). Its own Python reader makes an array view of
every string, which takes seconds for a vocabulary of 50,000, so the header is read here.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from models.errors import PoolError

if TYPE_CHECKING:
    import tokenizers

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)

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
_PLAIN = ("F32", "F16", "BF16", "F64")

# How text is split before merging, by `tokenizer.ggml.pre` (llama.cpp's names and expressions).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "qwen2": (_LLAMA3.replace("{1,3}", ""),),
}
_BEGINS_TEXT = ("llama-bpe",)  # of those above, the ones that do so where the file is silent

# Token types of `tokenizer.ggml.token_type`.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


@dataclass(frozen=True, kw_only=True)
class GgufFile:
    """The header of one file. `parameters` counts elements, whatever their type's bits."""

    path: Path
    metadata: dict[str, Any]
    parameters: int
    quantization: str | None
    """The type that most elements have; None where all are floating-point numbers."""

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture; the prefix of its keys."""
        return str(self.metadata.get("general.architecture"))

    def value(self, key: str, default: Any = None) -> Any:  # noqa: ANN401 - as the file has it
        """Return the architecture's `key`; of one value per layer the largest.

        Raises `PoolError` where it is missing and `default` is None.
        """
        found = self.metadata.get(f"{self.architecture}.{key}", default)
        if found is None:
            raise PoolError(f"{self.path}: the key {self.architecture}.{key} is missing")
        return max(found) if isinstance(found, list) else found

    def end_tokens(self) -> frozenset[int]:
        """Return the tokens that end a text, a turn or a message."""
        ends = (self.metadata.get(f"tokenizer.ggml.{k}_token_id") for k in ("eos", "eot", "eom"))
        return frozenset(end for end in ends if end is not None)

    def special_tokens(self) -> dict[str, str]:
        """Return the texts of the special tokens by the names that templates use."""
        tokens = self.tokens()
        names = {
            "cls": "bos",
            "unknown": "unk",
            "padding": "pad",
        }  # older files of BERTs have a cls
        return {
            f"{names.get(name, name)}_token": tokens[index]
            for name in ("cls", "bos", "eos", "unknown", "padding")
            if (index := self.metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None
        }

    def tokens(self) -> list[str]:
        """Return the texts of all tokens; raises `PoolError` where the file has none."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list):
            raise PoolError(f"{self.path}: the key tokenizer.ggml.tokens is missing")
        return tokens


def read_gguf(path: Path) -> GgufFile:
    """Read the header of `path`; raises `PoolError` that says what is wrong with the file."""
    try:
        with path.open("rb") as stream:
            return _read(path, stream)
    except OSError as error:
        raise PoolError(f"{path} cannot be read: {error.strerror}") from None
    except (struct.error, UnicodeDecodeError, KeyError, OverflowError, MemoryError):
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
    if metadata.get("split.count", 1) > 1:
        raise PoolError(
            f"{path} is one of {metadata['split.count']} parts; join them with llama-gguf-split "
            "--merge"
        )
    num_elements: Counter[str] = Counter()
    end = 0
    for _ in range(num_tensors):
        _read_string(stream)
        (num_dimensions,) = _unpack(stream, "I")
        size = math.prod(_unpack(stream, "Q" * num_dimensions))
        kind, offset = _unpack(stream, "IQ")
        name, elements, num_bytes = _TENSOR_TYPES.get(kind, (f"type {kind}", 1, 0))
        num_elements[name] += size
        end = max(end, offset + size // elements * num_bytes)
    alignment = metadata.get("general.alignment", 32)
    start = -(-stream.tell() // alignment) * alignment
    length = path.stat().st_size
    if length < start + end:
        raise PoolError(f"{path} is cut off: it has {length} bytes, its header names {start + end}")
    packed = [(count, name) for name, count in num_elements.items() if name not in _PLAIN]
    return GgufFile(
        path=path,
        metadata=metadata,
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


def build_tokenizer(file: GgufFile) -> tokenizers.Tokenizer:
    """Return the file's tokenizer: the same ids as the one it was made from.

    Raises `PoolError` for a kind that is not built here.
    """
    from tokenizers import AddedToken  # noqa: PLC0415 - not needed to look at a file
    from tokenizers.processors import TemplateProcessing  # noqa: PLC0415

    kind = file.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        built, begins_text = _byte_level(file)
    elif kind == "llama":
        built, begins_text = _sentence_piece(file), True
    elif kind == "bert":
        built, begins_text = _word_piece(file), True
    elif kind == "t5":
        built, begins_text = _unigram(file), False
    else:
        raise PoolError(
            f"{file.path}: tokenizer.ggml.model {kind!r} is not read; allowed are gpt2, llama, "
            "bert, t5"
        )
    types = file.metadata.get("tokenizer.ggml.token_type") or []
    for token, token_type in zip(file.tokens(), types, strict=False):
        if token_type in (_UNKNOWN, _CONTROL):
            built.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == _USER_DEFINED:
            built.add_tokens([AddedToken(token, special=False, normalized=False)])
    bos, end = file.special_tokens().get("bos_token"), _end_of_text(file, kind)
    if not file.metadata.get("tokenizer.ggml.add_bos_token", begins_text):
        bos = None
    frame = [token for token in (bos, end) if token]
    if frame:
        # A second text stands apart as BERT and RoBERTa have it.
        between = [end] if kind == "bert" else [end, end]
        second = [*(between if end else ()), "$B:1", *([f"{end}:1"] if end else ())]
        built.post_processor = TemplateProcessing(
            single=[*([bos] if bos else ()), "$A", *([end] if end else ())],
            pair=[*([bos] if bos else ()), "$A", *second],
            special_tokens=[(token, built.token_to_id(token)) for token in dict.fromkeys(frame)],
        )
    return built


def _end_of_text(file: GgufFile, kind: str) -> str | None:
    """Return what an encoder's texts end with; prompts that are to be answered have no end."""
    if kind != "bert" and not file.value("pooling_type", 0):
        return None
    name, ends = ("seperator", True) if kind == "bert" else ("eos", kind == "t5")
    index = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    if index is None or not file.metadata.get("tokenizer.ggml.add_eos_token", ends):
        return None
    end: str = file.tokens()[index]
    return end


def _byte_level(file: GgufFile) -> tuple[tokenizers.Tokenizer, bool]:
    """Byte-level byte-pair encoding, as GPT-2 and most since; and whether it begins a text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415

    split = file.metadata.get("tokenizer.ggml.pre", "gpt-2")
    if split not in _SPLITS:
        raise PoolError(
            f"{file.path}: tokenizer.ggml.pre {split!r} is not read; allowed are "
            f"{', '.join(_SPLITS)}"
        )
    merges = [tuple(merge.split(" ")) for merge in file.metadata.get("tokenizer.ggml.merges", ())]
    vocabulary = {token: index for index, token in enumerate(file.tokens())}
    built = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=split == "llama-bpe"))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[split]]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    built.decoder = decoders.ByteLevel()
    return built, split in _BEGINS_TEXT


def _sentence_piece(file: GgufFile) -> tokenizers.Tokenizer:
    """SentencePiece's byte-pair encoding: merges are ranked by the score of what they make."""
    from tokenizers import Tokenizer, decoders, models, normalizers  # noqa: PLC0415

    tokens = file.tokens()
    vocabulary = {token: index for index, token in enumerate(tokens)}
    scores = file.metadata.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    ranked = [
        (-scores[index], vocabulary[token[:cut]], vocabulary[token[cut:]], token[:cut], token[cut:])
        for index, token in enumerate(tokens)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    merges = [(left, right) for *_, left, right in sorted(ranked)]
    unknown = file.special_tokens().get("unk_token")
    built = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    built.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    return built


def _word_piece(file: GgufFile) -> tokenizers.Tokenizer:
    """BERT's WordPiece. The file marks where words begin, the library where they go on."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers  # noqa: PLC0415

    vocabulary = {}
    for index, token in enumerate(file.tokens()):
        special = token.startswith("[") and token.endswith("]")
        inner = token if special else f"##{token}"
        vocabulary[token[1:] if token.startswith("▁") else inner] = index
    unknown = file.special_tokens().get("unk_token", "[UNK]")
    built = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    built.normalizer = normalizers.BertNormalizer(lowercase=True)
    built.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    built.decoder = decoders.WordPiece()
    return built


def _unigram(file: GgufFile) -> tokenizers.Tokenizer:
    """SentencePiece's unigrams, as T5 and XLM-RoBERTa: the likeliest way to cut a text."""
    from tokenizers import (  # noqa: PLC0415
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
    )

    scores = file.metadata.get("tokenizer.ggml.scores") or [0.0] * len(file.tokens())
    unknown = file.metadata.get("tokenizer.ggml.unknown_token_id")
    built = Tokenizer(models.Unigram(list(zip(file.tokens(), scores, strict=True)), unknown))
    charsmap = file.metadata.get("tokenizer.ggml.precompiled_charsmap")
    steps: list[normalizers.Normalizer] = []
    if charsmap:
        steps.append(normalizers.Precompiled(bytes(value % 256 for value in charsmap)))
    if file.metadata.get("tokenizer.ggml.remove_extra_whitespaces", True):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    built.normalizer = normalizers.Sequence(steps)
    built.pre_tokenizer = pre_tokenizers.Metaspace()
    built.decoder = decoders.Metaspace()
    return built
