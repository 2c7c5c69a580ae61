"""What a checkpoint is and who can run it, told without loading it: `shoal inspect`, `shoal pull`.

The engine kinds themselves are asked, as when a pool is read, so that what is said here is what
would be said there.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models.adapter import ADAPTER_CONFIG, Adapter, read_adapter
from models.card import CONFIG, ModelCard, read_card
from models.chat_template import PromptFacts, read_prompt_facts
from models.engines.registry import KINDS, engine_traits
from models.errors import PoolError
from models.sources.locate import locate
from models.sources.safetensors import FOLDER_FILES, TEMPLATES
from models.spec import EngineSpec, Model, ModelSpec
from models.tokenizer import CheckpointTokenizer


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
        engines={
            kind: _hindrance(kind, card) for kind in KINDS.names() if KINDS.load(kind).formats
        },
    )


def look_at(path: Path, source: str) -> Inspection | Adapter:
    """Look at a checkpoint, or at an adapter, of whatever base; raises `PoolError`."""
    if (path / ADAPTER_CONFIG).is_file() and not (path / CONFIG).is_file():
        return read_adapter(path, None, source=source)
    return inspect_checkpoint(path, source)


def pull(source: str, out: Path, *, folder: Path) -> Inspection | Adapter:
    """Copy the data of `source` into the folder `out`, which must not exist, and look at it.

    The copy is made beside `out` and moved there once it is whole and readable; a download that
    broke off goes on where it stopped. Raises `PoolError`.
    """
    if out.exists():
        raise PoolError(f"{out} is there already; remove it or choose another")
    found = locate(source, folder=folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    gathered = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        gathered.chmod(0o755)
        copied = _copy(found.path, gathered)
        look_at(copied, found.source)
        gathered.rename(out)
    except OSError as error:
        raise PoolError(f"{out} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(gathered, ignore_errors=True)
    return look_at(out / copied.relative_to(gathered), found.source)


def _hindrance(kind: str, card: ModelCard) -> str | None:
    spec = EngineSpec(name=kind, kind=kind)
    model = Model(
        spec=ModelSpec(name="model", engine=kind, checkpoint=card.source),
        card=card,
        tokenizer=card.path,
    )
    try:
        return engine_traits(spec, [model]).needs
    except PoolError as error:
        return str(error)


def _copy(path: Path, folder: Path) -> Path:
    """Copy a checkpoint's data into `folder`, no code and no pickles; return where it is there."""
    if path.is_file():
        return Path(shutil.copy(path, folder / path.name))
    patterns = (*FOLDER_FILES, f"{TEMPLATES}/*.jinja")
    for file in sorted({file for pattern in patterns for file in path.glob(pattern)}):
        (folder / file.relative_to(path)).parent.mkdir(exist_ok=True)
        shutil.copy(file, folder / file.relative_to(path))
    return folder
