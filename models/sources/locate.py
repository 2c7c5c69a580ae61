"""From a source as pool.yaml writes it to a folder or a .gguf file on this machine.

./chunks/code                     a folder, or a .gguf file, relative to the pool file
hf:ORG/NAME[@REVISION]            a repository of the Hugging Face Hub (`hub`)
hf:ORG/NAME/FILE.gguf[@REVISION]  one GGUF file of it
package:DISTRIBUTION/FILE         a file or folder that an installed distribution ships
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath

from models.errors import PoolError
from models.sources.hub import fetch, parse_hub_source

HUB, PACKAGE = "hf:", "package:"


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
        return Located(source=source, path=_installed(source))
    path = (folder / source).absolute()
    if not path.exists():
        raise PoolError(
            f"there is no folder or .gguf file {path} (other sources are hf:ORG/NAME and "
            "package:DISTRIBUTION/FILE)"
        )
    if not path.is_dir() and path.suffix != ".gguf":
        raise PoolError(f"{path} is neither a folder nor a .gguf file")
    return Located(source=str(path), path=path)


def _installed(source: str) -> Path:
    """Return the file that `source` names by its path or its name within a distribution."""
    name, _, wanted = source.removeprefix(PACKAGE).partition("/")
    if not name or not wanted:
        raise PoolError(f"{source!r} is not of the form package:DISTRIBUTION/FILE")
    try:
        shipped = distribution(name).files or []
    except (PackageNotFoundError, ValueError):
        raise PoolError(
            f"{source}: the distribution {name!r} is not installed; try: pip install --no-deps "
            f"{name}"
        ) from None
    for file in shipped:  # the file itself, or one in the folder that is meant
        if file.as_posix() == wanted:
            return Path(str(file.locate()))
        if PurePosixPath(wanted) in PurePosixPath(file).parents:
            depth = len(file.parts) - len(PurePosixPath(wanted).parts)
            return Path(str(file.locate())).parents[depth - 1]
    named = [file for file in shipped if file.name == wanted]
    if len(named) != 1:
        raise PoolError(
            f"{source}: {name!r} ships {len(named)} files called {wanted!r}; its .gguf files are "
            f"{', '.join(str(file) for file in shipped if file.suffix == '.gguf') or 'none'}"
        )
    return Path(str(named[0].locate()))
