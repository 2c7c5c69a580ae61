"""Files that last: written whole or not at all, one format for everything that is learned, and
files that installed distributions ship."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from policies.errors import ArtifactError, PolicyError

_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_target(target: Path, *, option: str = "", suffix: str = "") -> None:
    """Raise `PolicyError` where no file can be written to `target`: to ask before long work.

    With a `suffix`, also where its name ends in another; `option` is the one that named it.
    """
    named = f"{option}: " if option else ""
    if not target.parent.is_dir():
        raise PolicyError(f"{named or f'{target}: '}there is no folder {target.parent}")
    if target.is_dir():
        raise PolicyError(f"{named}{target} is a folder, not a file")
    if suffix and target.suffix != suffix:
        raise PolicyError(f"{named}{target} does not end in {suffix}")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a path to write to; on leaving without an exception it becomes `target`.

    A link stays and leads to the new file. A device or a pipe stays, too, and is written to. The
    path has the target's suffix, by which some libraries tell the format. Raises `PolicyError` as
    `check_target` does, and where the folder takes no file or has no room for it.
    """
    check_target(target)
    is_file = not target.exists() or (target.is_file() and target.parent != Path("/dev"))
    target = target.resolve() if is_file else target
    folder = target.parent if is_file else None
    try:
        handle, name = tempfile.mkstemp(dir=folder, prefix=".", suffix=target.suffix)
    except OSError as error:
        raise PolicyError(
            f"{target} cannot be written: the folder {target.parent} takes no file: "
            f"{error.strerror}"
        ) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if is_file:
            temporary.chmod(0o644)
            temporary.replace(target)
        else:
            with temporary.open("rb") as written, target.open("wb") as out:
                shutil.copyfileobj(written, out)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise PolicyError(f"{target} cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(target: Path, content: str | bytes) -> None:
    """Write `content` (text as UTF-8) to `target`, as `replacing` does."""
    with replacing(target) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Give an empty folder to fill; on leaving without an exception it becomes `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        new, old = Path(temporary) / "new", Path(temporary) / "old"
        new.mkdir()
        yield new
        if target.exists():
            target.rename(old)
        new.rename(target)


PACKAGE: Final = "package:"
"""How a source begins that an installed distribution ships."""


def shipped(source: str) -> Path:
    """Return the file or folder that `source`, package:DISTRIBUTION/FILE, names by path or name.

    Raises `PolicyError` that says what was looked for.
    """
    name, _, wanted = source.removeprefix(PACKAGE).partition("/")
    if not name or not wanted:
        raise PolicyError(f"{source!r} is not of the form package:DISTRIBUTION/FILE")
    try:
        files = distribution(name).files or []
    except (PackageNotFoundError, ValueError):
        raise PolicyError(
            f"{source}: the distribution {name!r} is not installed; try: pip install --no-deps "
            f"{name}"
        ) from None
    for file in files:  # the file itself, or one in the folder that is meant
        if file.as_posix() == wanted:
            return Path(str(file.locate()))
        if PurePosixPath(wanted) in PurePosixPath(file).parents:
            depth = len(file.parts) - len(PurePosixPath(wanted).parts)
            return Path(str(file.locate())).parents[depth - 1]
    named = [file for file in files if file.name == wanted]
    if len(named) != 1:
        models = [
            str(file.parent if file.name == "config.json" else file)
            for file in files
            if file.name == "config.json" or file.suffix == ".gguf"
        ]
        raise PolicyError(
            f"{source}: {name!r} ships {len(named)} files called {wanted!r}; its models are "
            f"{', '.join(models) or 'none'}"
        )
    return Path(str(named[0].locate()))


Built = TypeVar("Built")

_META: Final = "meta"
_DAMAGED: Final = (
    # What zipfile and NumPy raise where a byte of the archive is wrong.
    ValueError,
    EOFError,
    AttributeError,
    RuntimeError,
    MemoryError,
    KeyError,
    TypeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """What a file of a kind of its own holds.

    `settings` is the JSON data that stands beside the `arrays`; `data_sha256` the hash of what it
    was learned from, empty where nobody knows; `metrics` (JSON data) how good it proved to be.
    """

    settings: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    data_sha256: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)


def write_artifact(file: Path, artifact: Artifact, *, kind: str, schema: int) -> None:
    """Write `artifact` to `file`, replacing what was there in one step.

    `kind` says what it is ("router"), `schema` by which version of that kind's layout.
    """
    meta = {
        "kind": kind,
        "schema": schema,
        "data_sha256": artifact.data_sha256,
        "metrics": artifact.metrics,
        "settings": artifact.settings,
    }
    text = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    with replacing(file) as fresh, fresh.open("wb") as stream:
        np.savez_compressed(stream, allow_pickle=False, **{_META: text, **artifact.arrays})


def read_artifact(
    file: Path, build: Callable[[Artifact], Built], *, kind: str, schema: int
) -> Built:
    """Return what `build` makes of `file`'s content.

    `build` may raise `KeyError`, `TypeError`, `IndexError` or `ValueError` (so any `PolicyError`)
    for what is missing or makes no sense. Raises `ArtifactError`, which names the file and what is
    wrong with it.
    """
    artifact = _read(file, kind, schema)
    try:
        return build(artifact)
    except KeyError as error:
        raise ArtifactError(f"{file} is not a complete {kind} file: {error} is missing") from None
    except (IndexError, TypeError, ValueError) as error:
        raise ArtifactError(f"{file} is not a {kind} file that can be used: {error}") from None


def check_shape(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    """Raise `ArtifactError` unless the array has this shape."""
    if array.shape != shape:
        raise ArtifactError(f"the array {name!r} has shape {array.shape}, not {shape}")


def _read(file: Path, kind: str, schema: int) -> Artifact:
    try:
        with file.open("rb") as stream:
            if not zipfile.is_zipfile(stream):  # NumPy's own words advise to trust it
                raise zipfile.BadZipFile("it is no archive of arrays")
            stream.seek(0)
            with np.load(stream, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        meta = json.loads(arrays.pop(_META).tobytes())
        found = meta["kind"], meta["schema"]
        artifact = Artifact(
            settings=dict(meta["settings"]),
            arrays=arrays,
            data_sha256=str(meta["data_sha256"]),
            metrics=dict(meta["metrics"]),
        )
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error.strerror or error}") from None
    except _DAMAGED as error:
        raise ArtifactError(f"{file} is not a {kind} file, or is damaged: {error}") from None
    if found != (kind, schema):
        raise ArtifactError(
            f"{file} is a {found[0]} file of schema {found[1]!r}, not a {kind} file of schema "
            f"{schema}; learn it anew"
        )
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu":
            raise ArtifactError(f"{file}: the array {name!r} holds {array.dtype}, not numbers")
    return artifact


def files_below(folder: Path) -> list[Path]:
    """Return what stands in `folder` and below and is no folder, in order of the paths.

    Hidden files are left out, links are followed (a circle of them once).

    Raises:
        OSError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise error

    found: list[Path] = []
    met: set[str] = set()
    for name, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(name)
        # One of a hidden name, or one that a link has led to before, has nothing new.
        folders[:] = [] if real in met else [one for one in folders if not one.startswith(".")]
        if real not in met:
            found += [Path(name, file) for file in files if not file.startswith(".")]
        met.add(real)
    return sorted(found)


def content_sha256(path: Path) -> str | None:
    """Return a hash of a file's content, or of a folder's: all files below but hidden ones, with
    their names. None where there is neither.

    Raises:
        OSError: something there cannot be read.
    """
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    if not path.is_dir():
        return None
    files = [file for file in files_below(path) if file.is_file()]
    seen = [(str(file.relative_to(path)), content_sha256(file)) for file in files]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()
