"""The tokenizer of a checkpoint as the `tokenizers` library has it, without a chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.chat_template import read_tokenizer_config
from models.errors import PoolError, RequestError
from models.sources.gguf import read_gguf
from models.sources.gguf_tokenizer import build_tokenizer
from models.sources.safetensors import read_json

if TYPE_CHECKING:
    import tokenizers


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """Return the tokenizer of a checkpoint (a folder or a .gguf file) as transformers would.

    That is tokenizer.json, with the tokens that tokenizer_config.json adds to it and says are
    special. Raises `PoolError` that names the file.
    """
    import tokenizers  # noqa: PLC0415 - not needed where no model has a checkpoint

    if path.suffix == ".gguf":
        return build_tokenizer(read_gguf(path))
    file = path / "tokenizer.json"
    read_json(file)  # says what is wrong with it more plainly than the library
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
        _complete(tokenizer, read_tokenizer_config(path))
    except PoolError:
        raise
    except Exception as error:  # the library raises bare exceptions
        raise PoolError(f"{file} cannot be read: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def encode_all(
    tokenizer: tokenizers.Tokenizer, texts: Sequence[str], *, special: bool = True
) -> list[tokenizers.Encoding]:
    """Return the encodings of `texts`; raises `RequestError` for what the tokenizer cannot encode.

    One without a token for the unknown says so only of a text that has something unknown.
    """
    try:
        # Encoding a single text holds the interpreter's lock all the while; a batch does not.
        return list(tokenizer.encode_batch_fast(texts, add_special_tokens=special))
    except Exception as error:  # the library raises bare exceptions
        raise RequestError(f"the model's tokenizer cannot encode this text: {error}") from None


# Those that transformers knows by name, in the order in which it adds them.
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


def _complete(tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the tokens of tokenizer_config.json as transformers does: listed, named, and extra ones.

    What a text begins and ends with is tokenizer.json's own affair, whatever the config says. Where
    it says that special tokens are split, they are text in whatever is encoded.
    """
    from tokenizers import AddedToken  # noqa: PLC0415

    def token(value: str | Mapping[str, Any], **flags: bool) -> AddedToken:
        if isinstance(value, str):
            return AddedToken(value, special=True)
        return AddedToken(**{k: v for k, v in value.items() if k != "__type"} | flags)

    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens"))
    by_id = tokenizer.get_added_tokens_decoder()
    known = by_id.values()
    listed = config.get("added_tokens_decoder") or {}
    additions = [token(listed[index]) for index in sorted(listed, key=int)]
    as_they_are = {repr(added) for added in known}
    additions = [added for added in additions if repr(added) not in as_they_are]
    extra = config.get("extra_special_tokens") or []
    unnamed = config.get("additional_special_tokens") or []
    if isinstance(extra, list):
        extra, unnamed = {}, extra or unnamed
    own = {key: value for key, value in config.items() if key.endswith("_token")}
    names = [*_NAMED, *(key for key in own if key not in _NAMED)]
    named = [own[key] for key in names if isinstance(own.get(key), str | dict)]
    specials = [token(value, special=True) for value in (*named, *extra.values(), *unnamed)]
    special = {added.content for added in specials}
    older = config.get("added_tokens") or {}  # ids by text
    additions += [
        AddedToken(text, normalized=text not in special, special=text in special)
        for text in sorted(older, key=lambda text: int(older[text]))
        if older[text] not in by_id
    ]
    texts = {added.content for added in (*known, *additions)}
    for added in specials:
        if added.content not in texts:
            additions.append(added)
            texts.add(added.content)
    for added in additions:
        added.special = added.special or added.content in special
    tokenizer.add_tokens(additions)
