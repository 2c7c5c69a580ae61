"""Runs each stage once: skipped while its inputs are what they were, rerun when one changes.

A stage has a folder `WORK/<name>` and writes `manifest.json` there when it is done: the hashes of
its settings, of the files that it reads, and of the stages that it builds on. Until then
`started.json` says what it was begun with, so that an interrupted stage finds its own checkpoints
again and nobody else's. It knows nothing of what the stages do.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from models.downscale.errors import OutputError
from policies.files import write_atomic

_MANIFEST: Final = "manifest.json"
_STARTED: Final = "started.json"


class Stages:
    """The stages of one run, in the folder `work`."""

    def __init__(
        self,
        work: Path,
        *,
        report: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is written before the first stage runs; `clock` counts seconds."""
        self._work = work
        self._report = report
        self._clock = clock

    def folder(self, name: str) -> Path:
        """Return the folder of the stage `name`."""
        return self._work / name

    def run(
        self,
        name: str,
        action: Callable[[Path], None],
        *,
        settings: Mapping[str, Any],
        files: Sequence[Path] = (),
        upstream: Sequence[str] = (),
    ) -> Path:
        """Run `action` on the folder of stage `name`, if it must be, and return the folder.

        `settings` (JSON), the content of `files`, and the stages `upstream`, which must have run,
        are all that `action` may depend on. Whatever it raises leaves the stage unfinished.
        """
        folder = self.folder(name)
        inputs = {
            "settings": settings,
            "files": {str(file): file_sha256(file) for file in files},
            "upstream": {one: self._digest(one) for one in upstream},
        }
        digest = _sha256(json.dumps(inputs, sort_keys=True).encode())
        if _read(folder / _MANIFEST).get("digest") == digest:
            self._report(f"{name}: unchanged")
            return folder
        if _read(folder / _STARTED).get("digest", digest) != digest:
            shutil.rmtree(folder, ignore_errors=True)
        (folder / _MANIFEST).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _STARTED, {"stage": name, "digest": digest, "inputs": inputs})
        begun_s = self._clock()
        action(folder)
        spent_s = round(self._clock() - begun_s, 1)
        manifest = {"stage": name, "digest": digest, "wall_clock_s": spent_s, "inputs": inputs}
        write_json(folder / _MANIFEST, manifest)
        self._report(f"{name}: done in {spent_s:.1f} s")
        return folder

    def wall_clock_s(self, name: str) -> float:
        """Return how long the finished stage `name` took when it last ran."""
        return float(_read(self.folder(name) / _MANIFEST)["wall_clock_s"])

    def _digest(self, name: str) -> str:
        manifest = _read(self.folder(name) / _MANIFEST)
        assert "digest" in manifest, f"stage {name} has not run"
        return str(manifest["digest"])


@contextmanager
def claimed(out: Path, *, resume: bool) -> Iterator[Path]:
    """Hold the output folder for one run, and yield its work folder.

    Raises:
        OutputError: it holds something already and `resume` is off, or another run is at work.
    """
    work = out / ".work"
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; --out needs a folder")
    if not resume and out.is_dir() and any(out.iterdir()):
        what = "an unfinished run" if work.is_dir() else "files already"
        what = "a pool already" if (out / "pool.yaml").exists() else what
        raise OutputError(f"{out} holds {what}; pass --resume to go on from it, or remove it")
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"another run is at work in {out}") from None
        yield work


def publish(assembled: Path, out: Path) -> None:
    """Put what stands in `assembled` into `out`, `pool.yaml` last: without it there is no pool.

    What an earlier run put there under the same names is replaced. `assembled` stays, so that a
    later run need not do it again.
    """
    moving = out / ".work" / "moving"
    shutil.rmtree(moving, ignore_errors=True)
    shutil.copytree(assembled, moving, ignore=shutil.ignore_patterns(_MANIFEST, _STARTED))
    (out / "pool.yaml").unlink(missing_ok=True)
    for entry in sorted(moving.iterdir(), key=lambda entry: entry.name == "pool.yaml"):
        target = out / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.rename(target)
    moving.rmdir()


def file_sha256(file: Path) -> str:
    """Return the hash of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write `content`, atomically."""
    write_atomic(file, json.dumps(content, indent=1) + "\n")


def _read(file: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
