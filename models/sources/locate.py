"""From a source as pool.yaml writes it to a folder or a .gguf file on this machine.

./chunks/code                     a folder, or a .gguf file, relative to the pool file
hf:ORG/NAME[@REVISION]            a repository of the Hugging Face Hub
hf:ORG/NAME/FILE.gguf[@REVISION]  one GGUF file of it
package:DISTRIBUTION/FILE         a file or folder that an installed distribution ships

From the Hub, by `huggingface_hub`, come weights as safetensors or GGUF, configurations, tokenizers
and templates; code and pickles never do. The first load writes the commit it got into a lock file
beside the pool, and every later load, on any replica, asks for that commit. Deleting its line moves
the pool on. The token, the cache folder, the endpoint and the offline mode are huggingface_hub's
own, from the environment: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from models.errors import PoolError
from models.sources.safetensors import FOLDER_FILES, TEMPLATES
from policies.errors import PolicyError
from policies.files import PACKAGE, shipped, write_atomic

# Every folder of a repository but the one of templates, in fnmatch, whose `*` crosses folders.
_OTHER_FOLDERS = ["[!a]*/*", "a[!d]*/*"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SOURCE = re.compile(
    r"hf:(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@]+\.gguf))?(?:@(?P<revision>[^@]+))?"
)


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A repository, one GGUF file of it or None for its safetensors folder, and a revision."""

    name: str
    file: str | None
    revision: str

    def at(self, revision: str) -> str:
        """Return the source text for another revision."""
        return f"hf:{self.name}{'/' + self.file if self.file else ''}@{revision}"


def parse_hub_source(source: str) -> HubSource:
    """Read `hf:ORG/NAME[/FILE.gguf][@REVISION]`; raises `PoolError`."""
    match = _SOURCE.fullmatch(source)
    if match is None or ".." in PurePosixPath(match["file"] or "").parts:
        raise PoolError(
            f"{source!r} is not of the form hf:ORG/NAME[@REVISION] or "
            "hf:ORG/NAME/FILE.gguf[@REVISION]"
        )
    return HubSource(name=match["name"], file=match["file"], revision=match["revision"] or "main")


def fetch(source: HubSource, *, lock: Path | None) -> tuple[Path, str]:
    """Bring `source` into the Hub's cache; return where it is there, and its commit.

    What is there already is not fetched again, and a broken download goes on where it stopped.
    Raises `PoolError` where there is no such repository, revision or file, no permission, or
    neither a network nor a cached copy.
    """
    from huggingface_hub import hf_hub_download, snapshot_download  # noqa: PLC0415 - slow
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

    key = source.at(source.revision)
    revision = _locked(lock).get(key, source.revision)
    try:
        if source.file is not None:
            path = Path(hf_hub_download(source.name, source.file, revision=revision))
        else:
            path = Path(
                snapshot_download(
                    source.name,
                    revision=revision,
                    allow_patterns=[*FOLDER_FILES, f"{TEMPLATES}/*"],
                    ignore_patterns=_OTHER_FOLDERS,
                )
            )
    except LocalEntryNotFoundError:
        raise PoolError(
            f"{key}: the Hub cannot be reached and the cache has no copy of revision {revision}; "
            "connect once, or set HF_HOME to a cache that has one"
        ) from None
    except Exception as error:  # the library's, its HTTP client's and the file system's
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise PoolError(f"{key}: cannot be fetched: {reason[0]}") from None
    commit = _commit_of(path)
    if lock is not None and not _COMMIT.fullmatch(source.revision):
        _keep(lock, key, commit)
    return path, commit


def _commit_of(path: Path) -> str:
    """Return the commit of a path in the cache: .../snapshots/COMMIT[/FILE]."""
    parts = path.parts
    return parts[len(parts) - parts[::-1].index("snapshots")]


def _locked(lock: Path | None) -> dict[str, str]:
    if lock is None or not lock.is_file():
        return {}
    try:
        content = json.loads(lock.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PoolError(f"{lock} is not valid JSON: {error}") from None
    if not isinstance(content, dict) or not all(
        isinstance(commit, str) and _COMMIT.fullmatch(commit) for commit in content.values()
    ):
        raise PoolError(f"{lock} must map sources to commits of 40 hexadecimal digits")
    return content


def _keep(lock: Path, key: str, commit: str) -> None:
    """Write the commit down, unless it is there; whole or not at all."""
    known = _locked(lock)
    if known.get(key) == commit:
        return
    text = json.dumps({**known, key: commit}, indent=2, sort_keys=True) + "\n"
    try:
        write_atomic(lock, text)
    except OSError as error:
        raise PoolError(
            f"{lock} cannot be written ({error.strerror}); every replica must get the same "
            f"revision, so name the commit: {key.rpartition('@')[0]}@{commit}"
        ) from None


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
    repositories; None: none is kept. Raises `PoolError` that says what was looked for.
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
    try:
        missing = not path.exists()
    except OSError as error:  # a name that no file can have, a folder that nobody may look into
        raise PoolError(f"{path} cannot be looked for: {error.strerror}") from None
    if missing:
        raise PoolError(
            f"there is no folder or .gguf file {path} (other sources are hf:ORG/NAME and "
            "package:DISTRIBUTION/FILE)"
        )
    if not path.is_dir() and path.suffix != ".gguf":
        raise PoolError(f"{path} is neither a folder nor a .gguf file")
    return Located(source=str(path), path=path)
