"""The tokenizer of a GGUF file, by the `tokenizers` library: the ids of the one it was made of.

How text is split before merging stands in the file by llama.cpp's names only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.errors import PoolError
from models.sources.gguf import GgufFile

if TYPE_CHECKING:
    import tokenizers
    from tokenizers import normalizers

# The expressions of the models' own tokenizer.json files; each splits what those before it left.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + _BLANKS
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_LLAMA3 = (rf"{_SHORT}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}|{_SIGNS}",)
_CASED = (
    rf"{_WORD}{_UPPER}*{_LOWER}+%s|{_WORD}{_UPPER}+{_LOWER}*%s|%s| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|"
)
_SPLITS: dict[str, tuple[str, ...]] = {
    name: expressions
    for names, expressions in (
        (
            "gpt-2 mpt olmo phi-2 jais exaone4 mellum modern-bert trillion granite-docling",
            (_WORDS,),
        ),
        ("smollm starcoder refact command-r codeshell exaone minerva-7b", (r"\p{N}", _WORDS)),
        # llama.cpp's own, for a file whose converter did not know the tokenizer.
        ("default", (r"[\p{P}$+<=>^~|]+", _WORDS, r"\p{N}+", "[0-9]{3}")),
        ("falcon", (r"[\p{P}$+<=>^~|`]+", _WORDS, "[0-9]{3}")),
        ("llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral lfm2", _LLAMA3),
        ("dbrx smaug-bpe glm4 chatglm-bpe", _LLAMA3),
        (
            "qwen2 deepseek-r1-qwen megrez stablelm2 hunyuan",
            (rf"{_SHORT}|{_WORD}\p{{L}}+|\p{{N}}|{_SIGNS}",),
        ),
        (
            "qwen35",
            (
                rf"{_SHORT}|{_WORD}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
                rf"|{_BLANKS}",
            ),
        ),
        ("tekken", (_CASED % ("", "", r"\p{N}") + _BLANKS,)),
        ("gpt-4o llama4", (_CASED % (f"{_SHORT}?", f"{_SHORT}?", r"\p{N}{1,3}") + _BLANKS,)),
        (
            "deepseek-v3 hunyuan-dense",
            (
                r"\p{N}{1,3}",
                "[一-龥\u3040-ゟ゠-ヿ]+",
                r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
                rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}",
            ),
        ),
    )
    for name in names.split()
}
# Words that are tokens are not merged, and texts begin with a token where the file is silent.
_AS_LLAMA3 = (
    *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "lfm2"),
    "tekken",
)

# Token types of `tokenizer.ggml.token_type`.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


def build_tokenizer(file: GgufFile) -> tokenizers.Tokenizer:
    """Return the file's tokenizer: the same ids as the one it was made from.

    Raises `PoolError` for a kind that is not built here, and for one that is not whole.
    """
    try:
        return _build(file)
    except PoolError:
        raise
    except Exception as error:  # the library raises bare exceptions
        raise PoolError(f"{file.path}: its tokenizer cannot be built: {error}") from None


def _build(file: GgufFile) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken  # noqa: PLC0415 - not needed to look at a file
    from tokenizers.processors import TemplateProcessing  # noqa: PLC0415

    kind = file.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        built, begins_text = _byte_level(file)
    elif kind == "llama":
        built, begins_text = _sentence_piece(file), True
    elif kind == "gemma4":
        built, begins_text = _gemma(file), True
    elif kind == "bert":
        built, begins_text = _word_piece(file), True
    elif kind == "t5":
        built, begins_text = _unigram(file), False
    else:
        raise PoolError(
            f"{file.path}: tokenizer.ggml.model {kind!r} is not read; allowed are gpt2, llama, "
            "gemma4, bert, t5"
        )
    types = file.metadata.get("tokenizer.ggml.token_type") or []
    apart = [
        AddedToken(token, special=kind_of != _USER_DEFINED, normalized=False)
        for token, kind_of in zip(file.tokens(), types, strict=False)
        if kind_of in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    built.add_tokens(apart)  # all at once: each call builds their automaton anew
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
    index = file.token_id(name)
    if index is None or not file.metadata.get("tokenizer.ggml.add_eos_token", ends):
        return None
    end: str = file.tokens()[index]
    return end


def _byte_level(file: GgufFile) -> tuple[tokenizers.Tokenizer, bool]:
    """Byte-level byte-pair encoding, as GPT-2 and most since; and whether it begins a text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415

    split = file.metadata.get("tokenizer.ggml.pre", "default")
    if split not in _SPLITS:
        raise PoolError(
            f"{file.path}: tokenizer.ggml.pre {split!r} is not read; allowed are "
            f"{', '.join(_SPLITS)}"
        )
    vocabulary = {token: index for index, token in enumerate(file.tokens())}
    whole_words = split in _AS_LLAMA3
    built = Tokenizer(models.BPE(vocabulary, _merges(file), ignore_merges=whole_words))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS[split]]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    built.decoder = decoders.ByteLevel()
    return built, whole_words


def _merges(file: GgufFile) -> list[tuple[str, str]]:
    pairs = ((merge, merge.find(" ", 1)) for merge in file.texts("tokenizer.ggml.merges"))
    return [(merge[:at], merge[at + 1 :]) for merge, at in pairs]


def _gemma(file: GgufFile) -> tokenizers.Tokenizer:
    """Gemma 4's: SentencePiece's alphabet, with the merges written down; lines are apart."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers  # noqa: PLC0415

    vocabulary = {token: index for index, token in enumerate(file.tokens())}
    unknown = file.special_tokens().get("unk_token")
    built = Tokenizer(
        models.BPE(vocabulary, _merges(file), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    built.normalizer = normalizers.Replace(" ", "▁")
    built.pre_tokenizer = pre_tokenizers.Split(Regex(r"[^\n]+|\n+"), "isolated")
    built.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return built


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
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers  # noqa: PLC0415

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
