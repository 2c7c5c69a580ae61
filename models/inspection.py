"""What a checkpoint is and who can run it, told without loading it: `shoal inspect`, `shoal pull`.

The engine kinds themselves are asked, as when a pool is read, so that what is said here is what
would be said there. What they say also makes a pool file of checkpoints alone, for people who have
none yet: `shoal serve SOURCE`.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from models.adapter import ADAPTER_CONFIG, Adapter, read_adapter
from models.card import CONFIG, ModelCard, read_card
from models.chat_template import PromptFacts, read_prompt_facts
from models.engines.kind import EngineTraits
from models.engines.registry import KINDS, engine_traits
from models.errors import PoolError
from models.sources.locate import HUB, locate
from models.sources.safetensors import FOLDER_FILES, TEMPLATES
from models.spec import EngineSpec, Model, ModelSpec
from models.tokenizer import CheckpointTokenizer
from policies.files import replacing_folder, write_atomic

# Who runs a checkpoint where nobody says so: the first of these that can, else any other kind.
_PREFERRED = ("stacked", "llamacpp", "vllm", "encoder")
# How answers are drawn where neither a request nor the checkpoint says: as llama.cpp does.
_SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A checkpoint's facts. `engines` says of each kind why it cannot run it; None: it can."""

    card: ModelCard
    prompts: PromptFacts
    tokenizer: CheckpointTokenizer
    engines: Mapping[str, str | None]

    def end_token_texts(self) -> dict[int, str]:
        """Return what the tokens that end an answer look like, by id."""
        return {end: self.tokenizer.token_text(end) for end in sorted(self.card.end_tokens)}


def inspect_checkpoint(path: Path, source: str) -> Inspection:
    """Look at the checkpoint at `path`; raises `PoolError` for what nobody could run."""
    card = read_card(path, source=source)
    return Inspection(
        card=card,
        prompts=read_prompt_facts(path),
        tokenizer=CheckpointTokenizer(path),
        engines={kind: _asked(kind, card)[1] for kind in _kinds()},
    )


def look_at(path: Path, source: str) -> Inspection | Adapter:
    """Look at a checkpoint, or at an adapter, of whatever base; raises `PoolError`."""
    if (path / ADAPTER_CONFIG).is_file() and not (path / CONFIG).is_file():
        return read_adapter(path, None, source=source)
    return inspect_checkpoint(path, source)


def write_pool(sources: Sequence[str], folder: Path) -> Path:
    """Write a pool file of checkpoints into `folder` and return it.

    Each of `sources` (relative to the working directory) becomes a model called like its file or
    repository, on an engine of its own, of a kind that can run it here. `auto` asks the first that
    writes answers. Raises `PoolError` where none can, or two have one name.
    """
    models: list[dict[str, object]] = []
    engines = []
    first: str | None = None
    for source in sources:
        found = locate(source, folder=Path())
        card = read_card(found.path, source=found.source)
        name = _name(found.source)
        asked = {kind: _asked(kind, card) for kind in _kinds()}
        able = [kind for kind, (_, hindrance) in asked.items() if hindrance is None]
        if not able:
            why = "; ".join(f"{kind}: {hindrance}" for kind, (_, hindrance) in asked.items())
            raise PoolError(f"{source}: no engine can run it here: {why}")
        if name in {model["name"] for model in models}:
            raise PoolError(f"{source}: a model is called {name!r} already; write a pool file")
        traits = asked[able[0]][0]
        if first is None and traits is not None and not traits.encodes:
            first = name
        engines.append({"name": name, "kind": able[0]})
        model: dict[str, object] = {"name": name, "engine": name, "checkpoint": found.source}
        models.append(model if card.sampling else {**model, "sampling": _SAMPLING})
    policies = {} if first is None else {"auto": {"kind": "fixed", "plan": first}}
    pool = {"name": "pool", "engines": engines, "models": models, "policies": policies}
    file = folder / "pool.yaml"
    write_atomic(file, yaml.safe_dump(pool, sort_keys=False))
    return file


def pull(source: str, out: Path, *, folder: Path) -> Inspection | Adapter:
    """Copy the data of `source` into the folder `out`, which must not exist, and look at it.

    The copy is made beside `out` and moved there once it is whole and readable; a download that
    broke off goes on where it stopped. Raises `PoolError`.
    """
    if out.exists():
        raise PoolError(f"{out} is there already; remove it or choose another")
    found = locate(source, folder=folder)
    try:
        with replacing_folder(out) as gathered:
            copied = _copy(found.path, gathered)
            look_at(copied, found.source)
    except OSError as error:
        raise PoolError(f"{out} cannot be written: {error.strerror}") from None
    return look_at(out / copied.relative_to(gathered), found.source)


def _kinds() -> list[str]:
    """Return the kinds of engines that read checkpoints, the preferred ones first."""
    names = [*_PREFERRED, *(name for name in KINDS.names() if name not in _PREFERRED)]
    return [name for name in names if KINDS.load(name).formats]


def _asked(kind: str, card: ModelCard) -> tuple[EngineTraits | None, str | None]:
    """Return what an engine of this kind with this model would be, and why it cannot run here."""
    found, read = "gguf" if card.is_gguf else "safetensors", KINDS.load(kind).formats
    if found not in read:
        return None, f"it reads {' and '.join(read)}, no {found}"
    spec = EngineSpec(name=kind, kind=kind)
    model = Model(
        spec=ModelSpec(name="model", engine=kind, checkpoint=card.source),
        card=card,
        tokenizer=card.path,
    )
    try:
        traits = engine_traits(spec, [model])
    except PoolError as error:
        return None, str(error)
    return traits, traits.needs


def _name(source: str) -> str:
    """Return what to call the model of `source`: its file, folder or repository as a name."""
    whole = source.partition("@")[0] if source.startswith(HUB) else source.rstrip("/")
    last = whole.rpartition("/")[2].removesuffix(".gguf")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).lstrip("._-") or "model"


def _copy(path: Path, folder: Path) -> Path:
    """Copy a checkpoint's data into `folder`, no code and no pickles; return where it is there."""
    if path.is_file():
        return Path(shutil.copy(path, folder / path.name))
    patterns = (*FOLDER_FILES, f"{TEMPLATES}/*.jinja")
    for file in sorted({file for pattern in patterns for file in path.glob(pattern)}):
        (folder / file.relative_to(path)).parent.mkdir(exist_ok=True)
        shutil.copy(file, folder / file.relative_to(path))
    return folder
