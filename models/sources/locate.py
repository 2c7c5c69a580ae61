"""From a source as pool.yaml writes it to a folder or a .gguf file on this machine.

./chunks/code                     a folder, or a .gguf file, relative to the pool file
hf:ORG/NAME[@REVISION]            a repository of the Hugging Face Hub (`hub`)
hf:ORG/NAME/FILE.gguf[@REVISION]  one GGUF file of it
package:DISTRIBUTION/FILE         a file or folder that an installed distribution ships
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from models.errors import PoolError
from models.sources.hub import fetch, parse_hub_source
from policies.errors import PolicyError
from policies.files import PACKAGE, shipped

HUB = "hf:"


@dataclass(frozen=True, kw_only=True)
class Located:
    """A source and where it is on this machine.

    `source` finds the same files on any machine: paths are absolute, a Hub revision is a commit.
    """

    source: str
    path: Path


def locate(source: str, *, folder: Path, lock: Path | None = None) -> Located:
    """Find `source` here, downloading what the Hub must send first.

    Relative paths start at `folder`. `lock` is the file that keeps the revisions of Hub
    repositories (see `hub`); None: none is kept. Raises `PoolError` that says what was looked for.
    """
    if source.startswith(HUB):
        repository = parse_hub_source(source)
        path, commit = fetch(repository, lock=lock)
        return Located(source=repository.at(commit), path=path)
    if source.startswith(PACKAGE):
        try:
            return Located(source=source, path=shipped(source))
        except PolicyError as error:
            raise PoolError(str(error)) from None
    path = (folder / source).absolute()
    if not path.exists():
        raise PoolError(
            f"there is no folder or .gguf file {path} (other sources are hf:ORG/NAME and "
            "package:DISTRIBUTION/FILE)"
        )
    if not path.is_dir() and path.suffix != ".gguf":
        raise PoolError(f"{path} is neither a folder nor a .gguf file")
    return Located(source=str(path), path=path)
