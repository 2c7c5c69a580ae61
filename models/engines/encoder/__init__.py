"""The encoder engine: texts to vectors, and how well texts answer a query; it writes none itself.

It reads what sentence-transformers writes (a Hugging Face encoder, its pooling, dense layers and
prompt), a plain encoder's folder (the mean over its tokens), and cross-encoders, which read query
and text together. Code in a folder is never run.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from models.engines.base import Encodes, Engine
from models.engines.encoder.engine import Encoder, EncoderEngine, TextReader
from models.engines.kind import EngineKind, EngineTraits, only_card
from models.errors import PoolError
from models.sources.safetensors import read_json
from models.spec import EngineSpec, Model
from models.tokenizer_json import read_tokenizer
from policies.encoders.pooling import Pooling, pooling_of
from policies.errors import PolicyError
from policies.kinds import Strict

_MODULES = ("Transformer", "Pooling", "Dense", "Normalize")
_CROSS = "ForSequenceClassification"
_WRITING = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
# Architectures whose places begin after the padding's.
_SHIFTED = ("roberta", "xlm-roberta", "camembert", "mpnet")


class EncoderOptions(Strict):
    """How texts are encoded: `batch_size` at once, of at most `max_tokens` each (None: the
    model's own limit).
    """

    batch_size: int = Field(32, ge=1, le=4096)
    max_tokens: int | None = Field(None, ge=4)


@dataclass(frozen=True, kw_only=True)
class Folder:
    """What a model's folder says: how token vectors become one, what then follows, and its limits.

    `weights` is where the transformer lies; `dense` are the folders of layers after the pooling.
    Texts begin with the `prompt`. A `cross` encoder scores pairs and knows no vectors.
    """

    weights: Path
    max_tokens: int
    pooling: Pooling = "mean"
    dense: tuple[Path, ...] = ()
    prompt: str = ""
    cross: bool = False

    @property
    def encodes(self) -> tuple[Encodes, ...]:
        """What it can tell."""
        return ("score",) if self.cross else ("vector", "score")

    def limited(self, max_tokens: int | None) -> Folder:
        """Return the same for texts of at most `max_tokens`; None: as many as it holds."""
        return replace(self, max_tokens=min(max_tokens or self.max_tokens, self.max_tokens))

    def reader(self) -> TextReader:
        """Return what reads texts for it; raises `PoolError`."""
        return TextReader(
            read_tokenizer(self.weights),
            max_tokens=self.max_tokens,
            prompt=self.prompt,
            cross=self.cross,
        )


def writes_texts(path: Path) -> str | None:
    """Return the architecture of a folder that is one of those that write; None for others."""
    architecture = _architecture(read_json(path / "config.json"))
    return architecture if architecture.endswith(_WRITING) else None


def read_folder(path: Path, context_tokens: int) -> Folder:
    """Read the folder of an encoder that has `context_tokens` places; raises `PoolError`."""
    config = read_json(path / "config.json")
    cross = _architecture(config).endswith(_CROSS)
    if cross and _num_labels(config) != 1:
        raise PoolError(
            f"{path / 'config.json'}: {_num_labels(config)} labels; an encoder that scores has one"
        )
    pooling: Pooling = "mean"
    dense: list[Path] = []
    for kind, folder in _modules(path):
        if kind == "Pooling":
            pooling = _pooling(folder / "config.json")
        elif kind == "Dense":
            dense.append(folder)
    stated = _optional(path / "sentence_bert_config.json").get("max_seq_length")
    places = context_tokens - (config.get("pad_token_id") or 0) - 1
    usual = places if config.get("model_type") in _SHIFTED else context_tokens
    prompts = _optional(path / "config_sentence_transformers.json")
    named = (prompts.get("prompts") or {}).get(prompts.get("default_prompt_name") or "")
    return Folder(
        weights=path,
        max_tokens=min(stated or usual, usual),
        pooling=pooling,
        dense=tuple(dense),
        prompt=named or "",
        cross=cross,
    )


def has_modules(path: Path) -> bool:
    """Return whether sentence-transformers wrote the folder at `path`."""
    return (path / "modules.json").is_file()


def _modules(path: Path) -> list[tuple[str, Path]]:
    """Return the kinds and folders of what follows the transformer."""
    if not has_modules(path):
        return []
    file = path / "modules.json"
    found = []
    for module in json.loads(file.read_text()):
        kind = str(module.get("type")).rpartition(".")[2]
        folder = (path / str(module.get("path") or "")).resolve()
        if kind not in _MODULES or not folder.is_relative_to(path.resolve()):
            raise PoolError(f"{file}: {module!r} is not supported; allowed are {_MODULES}")
        if kind == "Transformer" and folder != path.resolve():
            raise PoolError(f"{file}: the transformer must lie in the folder itself")
        found.append((kind, folder))
    return found


def _pooling(file: Path) -> Pooling:
    try:
        return pooling_of(read_json(file), file)
    except PolicyError as error:
        raise PoolError(str(error)) from None


def _architecture(config: Mapping[str, Any]) -> str:
    return str(next(iter(config.get("architectures") or ()), ""))


def _num_labels(config: Mapping[str, Any]) -> int:
    return len(config.get("id2label") or {}) or int(config.get("num_labels") or 2)


def _optional(file: Path) -> Mapping[str, Any]:
    return read_json(file) if file.is_file() else {}


def _inspect(spec: EngineSpec, options: EncoderOptions, models: Sequence[Model]) -> EngineTraits:
    folder = _folder_of(spec, options, models)
    return EngineTraits(
        fuses=False,
        logprobs=False,
        structures=(),
        encodes={models[0].name: folder.encodes},
        context_tokens=folder.max_tokens,
    )


def _folder_of(spec: EngineSpec, options: EncoderOptions, models: Sequence[Model]) -> Folder:
    """Return what the engine's one model is; raises `PoolError`."""
    card = only_card(spec, models)
    written = writes_texts(card.path)
    if written is not None:
        raise PoolError(f"{card.path / 'config.json'}: {written} writes texts; it is no encoder")
    return read_folder(card.path, card.context_tokens).limited(options.max_tokens)


def _create(spec: EngineSpec, options: EncoderOptions, models: Sequence[Model]) -> Engine:
    from models.engines.encoder.transformer import TransformerEncoder  # noqa: PLC0415 - loads torch

    folder = _folder_of(spec, options, models)

    async def load() -> Encoder:
        return await asyncio.to_thread(
            TransformerEncoder, spec, folder, batch_size=options.batch_size
        )

    return EncoderEngine(spec, models[0].name, folder.encodes, load)


KIND = EngineKind(
    options=EncoderOptions, inspect=_inspect, create=_create, formats=("safetensors",)
)
