"""The folder that vLLM serves a fused ensemble from: no weights, only where the members have them.

Its config.json is a member's with the widths of all members together (so that vLLM sizes its
cache for the wide model) and, under "shoal", the members' names and paths relative to the folder.
Tokenizer and chat template are the members' own, copied.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.card import ModelCard, read_card
from models.engines.stacked.architecture import read_architecture
from models.errors import PoolError
from policies.files import replacing_folder

ARCHITECTURE = "ShoalFusedForCausalLM"
_KEY = "shoal"
_WIDE = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
_COPIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


def write_folder(members: Mapping[str, ModelCard], folder: Path) -> None:
    """Write `folder` for `members` (at least two, of one shape and one tokenizer).

    Raises `PoolError` where members differ or are of a kind that cannot be fused, or if `folder`
    is there already.
    """
    if folder.exists():
        raise PoolError(f"{folder} is there already; remove it or choose another")
    if len(members) < 2:
        raise PoolError(f"at least two members are needed, got {', '.join(members) or 'none'}")
    (name, first), *rest = members.items()
    for other_name, other in rest:
        _check_fits(name, first, other_name, other)
    with replacing_folder(folder) as temporary:
        for file in (*_COPIED, *_TEMPLATES):
            if (first.path / file).is_file():
                shutil.copyfile(first.path / file, temporary / file)
        _write(temporary / "generation_config.json", _generation_config(members))
        _write(temporary / "config.json", _wide_config(members, folder.resolve()))


def read_members(folder: Path) -> dict[str, ModelCard]:
    """Return the members of a folder by name; `PoolError` names what is wrong with it."""
    file = folder / "config.json"
    try:
        members = json.loads(file.read_text())[_KEY]["members"]
        paths = {str(member["name"]): folder / str(member["path"]) for member in members}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PoolError(f"{file}: is {folder} made by `shoal stack`? ({error!r})") from None
    return {name: read_card(path) for name, path in paths.items()}


def _check_fits(name: str, first: ModelCard, other_name: str, other: ModelCard) -> None:
    if other.tokenizer_sha256 != first.tokenizer_sha256:
        raise PoolError(f"members need one tokenizer, but {other_name!r} has not that of {name!r}")
    theirs, ours = read_architecture(other), read_architecture(first)
    if theirs != ours:
        raise PoolError(
            f"members need one architecture, but {other_name!r} has {theirs} and {name!r} has "
            f"{ours}"
        )


def _wide_config(members: Mapping[str, ModelCard], folder: Path) -> dict[str, Any]:
    first = next(iter(members.values()))
    if not read_architecture(first).is_plain:
        raise PoolError(
            f"{first.path / 'config.json'}: only layers as Llama's, Mistral's or Qwen's, without "
            "a window or biases of the feed-forward, are fused in vLLM"
        )
    config = json.loads((first.path / "config.json").read_text())
    shape = first.shape
    config |= {"num_key_value_heads": shape.num_kv_heads, "head_dim": shape.head_dim}
    config |= {key: config[key] * len(members) for key in _WIDE}
    # read_architecture accepts a window only if no sequence outgrows it.
    config |= {key: None for key in ("sliding_window",) if key in config}
    config.pop("_name_or_path", None)
    return {
        **config,
        "architectures": [ARCHITECTURE],
        _KEY: {
            "members": [
                {"name": name, "path": os.path.relpath(card.path.resolve(), folder)}
                for name, card in members.items()
            ]
        },
    }


def _generation_config(members: Mapping[str, ModelCard]) -> dict[str, Any]:
    """The first member's, ended by the end tokens of all: an ensemble ends where one may."""
    first = next(iter(members.values())).path / "generation_config.json"
    config: dict[str, Any] = json.loads(first.read_text()) if first.is_file() else {}
    ends = sorted(frozenset().union(*(card.end_tokens for card in members.values())))
    return {**config, "eos_token_id": ends} if ends else config


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
