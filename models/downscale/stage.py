"""Runs each stage once, and again when anything that it read has changed.

A stage is a function `(run, folder, …)` that writes into its folder. Called as `(run, …)` it is
brought up to date and returns the folder, so that a stage depends on another by calling it. What it
reads is noted while it runs: keys of the recipe, files and folders by their content, other stages,
and the code that it is made of. `manifest.json` keeps these notes; as long as all of them hold, the
stage is skipped ("verifying traces", Mokhov et al. 2018, "Build Systems à la Carte"). Nobody lists
what a stage depends on, so nothing can be forgotten.

Until a stage is done, `started.json` holds its notes, so that an interrupted one finds its own
checkpoints again and nobody else's. This module knows nothing of what the stages do.
"""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType, MappingProxyType, MethodType
from typing import Any, Concatenate, Final, ParamSpec, TypeVar, cast

from pydantic import BaseModel
from tqdm import tqdm

from models.downscale.recipe import Recipe
from policies.files import content_sha256, write_atomic

Rest = ParamSpec("Rest")
Value = TypeVar("Value")

_MANIFEST: Final = "manifest.json"
_STARTED: Final = "started.json"
MARKS: Final = (_MANIFEST, _STARTED)
_MISSING: Final = "missing"
# Stands for the names of a table of the recipe, in their order.
_NAMES: Final = "*"
# The packages whose code decides what a stage writes.
_PIPELINE: Final = ("models.downscale", "models.training", "models.tasks")
_STAGES: Final[dict[str, Callable[..., Path]]] = {}


class Run:
    """One run of the pipeline: its recipe, its work folder, and what is being read by whom."""

    def __init__(
        self,
        recipe: Recipe,
        work: Path,
        *,
        report: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is written before the first stage runs; `clock` counts seconds."""
        self.report = report
        self._recipe = recipe
        # Paths within go into files and settings that are read from elsewhere.
        self._work = work.absolute()
        self._clock = clock
        self._reading: list[_Notes] = []
        self._digests: dict[str, str] = {}
        self._memory: dict[object, tuple[Any, Mapping[str, str]]] = {}
        self._content: dict[Path, str] = {}

    @property
    def recipe(self) -> Recipe:
        """The recipe; what is read of it is noted, key by key."""
        return cast(Recipe, Recorded(self._recipe, (), self._note_key))

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains, in the recipe's order."""
        return tuple(self.recipe.domains)

    def read(self, path: Path) -> Path:
        """Note the content of a file, or of all files in a folder and below but hidden ones, as
        read; returns `path`."""
        self._note(f"content {path}", self._digest_of(path))
        return path

    def up_to_date(self, name: str, module: str, action: Callable[[Path], None]) -> Path:
        """Run `action` on the folder of stage `name` if it must be, and return the folder.

        `module` is where the stage's code is. Whatever `action` raises leaves it unfinished.
        """
        if name not in self._digests:
            self._digests[name] = self._brought_up_to_date(name, module, action)
        self._note(f"stage {name}", self._digests[name])
        return self._work / name

    def remember(self, key: object, make: Callable[[], Value]) -> Value:
        """The value that `make` returned first; what it read counts as read whenever it is asked
        for."""
        if key not in self._memory:
            with self._noting(_Notes(None)) as notes:
                value = make()
            self._memory[key] = value, notes.read
        value, read = self._memory[key]
        if self._reading:
            self._reading[-1].add(read)
        return cast(Value, value)

    def _brought_up_to_date(self, name: str, module: str, action: Callable[[Path], None]) -> str:
        folder = self._work / name
        manifest = _read_json(folder / _MANIFEST)
        changed = self._first_change(manifest)
        if changed is None:
            self.report(f"{name}: unchanged")
            return str(manifest["digest"])
        if manifest:
            self.report(f"{name}: again, for {changed} has changed")
        if self._first_change(_read_json(folder / _STARTED)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
        (folder / _MANIFEST).unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        begun_s = self._clock()
        with self._noting(_Notes(folder / _STARTED)) as notes:
            notes.add({f"code {module}": code_digest(module)})
            action(folder)
        spent_s = round(self._clock() - begun_s, 1)
        digest = _sha256(json.dumps(sorted(notes.read.items())))
        write_json(
            folder / _MANIFEST, {"digest": digest, "wall_clock_s": spent_s, "read": notes.read}
        )
        self.report(f"{name}: done in {spent_s:.1f} s")
        return digest

    def _first_change(self, record: Mapping[str, Any]) -> str | None:
        """What of the notes in `record` holds no more, in the order of reading; None if all do."""
        if "read" not in record:
            return "everything"
        read: dict[str, str] = record["read"]
        return next((what for what, was in read.items() if self._now(what) != was), None)

    def _now(self, what: str) -> str:
        kind, _, name = what.partition(" ")
        if kind == "stage":
            head, *arguments = name.split("/")
            if head not in _STAGES:
                return _MISSING
            with self._noting(_Notes(None)):
                _STAGES[head](self, *arguments)
            return self._digests[name]
        if kind == "content":
            return self._digest_of(Path(name))
        if kind == "code":
            return code_digest(name)
        return _as_json(_look_up(self._recipe, tuple(name.split("/"))))

    def _digest_of(self, path: Path) -> str:
        if path not in self._content:
            self._content[path] = content_sha256(path) or _MISSING
        return self._content[path]

    def _note_key(self, path: tuple[str, ...], value: object) -> None:
        self._note(f"recipe {'/'.join(path)}", _as_json(value))

    def _note(self, what: str, digest: str) -> None:
        if self._reading:
            self._reading[-1].add({what: digest})

    @contextmanager
    def _noting(self, notes: _Notes) -> Iterator[_Notes]:
        self._reading.append(notes)
        try:
            yield notes
        finally:
            self._reading.pop()


class _Notes:
    """What was read, with its digest, in the order of reading; kept in `file` if there is one."""

    def __init__(self, file: Path | None) -> None:
        self.read: dict[str, str] = {}
        self._file = file
        if file is not None:
            write_json(file, {"read": {}})

    def add(self, read: Mapping[str, str]) -> None:
        fresh = {what: digest for what, digest in read.items() if what not in self.read}
        self.read |= fresh
        if fresh and self._file is not None:
            write_json(self._file, {"read": self.read})


class Recorded:
    """Stands for a part of the recipe, and tells `note` each value that is read of it.

    Methods and properties of the part run on this stand-in, so that what they read is told, too.
    """

    def __init__(
        self,
        part: BaseModel,
        path: tuple[str, ...],
        note: Callable[[tuple[str, ...], object], None],
        changed: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """`path` are the keys that lead to `part`; `changed` are values that replace its own."""
        self._part, self._path, self._note, self._changed = part, path, note, changed

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the part has there
        if name in self._changed:
            return self._changed[name]
        made = getattr(type(self._part), name, None)
        if isinstance(made, property):
            assert made.fget is not None
            return made.fget(self)
        if isinstance(made, FunctionType):
            return MethodType(made, self)
        return _recorded(getattr(self._part, name), (*self._path, name), self._note)

    def model_copy(self, *, update: Mapping[str, Any]) -> Recorded:
        """The same with some values replaced, as pydantic's."""
        return Recorded(self._part, self._path, self._note, {**self._changed, **update})

    def model_dump(self) -> dict[str, Any]:
        """All values, as pydantic's."""
        self._note(self._path, self._part)
        return {**self._part.model_dump(), **self._changed}


class _RecordedTable(Mapping[str, Any]):
    """The same for a part that is a table by names."""

    def __init__(
        self,
        part: Mapping[str, Any],
        path: tuple[str, ...],
        note: Callable[[tuple[str, ...], object], None],
    ) -> None:
        self._part, self._path, self._note = part, path, note

    def __getitem__(self, name: str) -> Any:  # noqa: ANN401 - whatever the part has there
        if name not in self._part:
            self._note((*self._path, name), None)
        return _recorded(self._part[name], (*self._path, name), self._note)

    def __iter__(self) -> Iterator[str]:
        self._note((*self._path, _NAMES), list(self._part))
        return iter(self._part)

    def __len__(self) -> int:
        return len(list(iter(self)))


def _recorded(
    value: object, path: tuple[str, ...], note: Callable[[tuple[str, ...], object], None]
) -> object:
    if isinstance(value, BaseModel):
        return Recorded(value, path, note)
    if isinstance(value, dict):
        return _RecordedTable(value, path, note)
    note(path, value)
    return value


def _look_up(part: object, path: tuple[str, ...]) -> object:
    """The value at `path` of a recipe; None where there is none."""
    for key in path:
        if key == _NAMES:
            return list(part) if isinstance(part, dict) else None
        part = part.get(key) if isinstance(part, dict) else getattr(part, key, None)
    return part


def stage(
    name: str,
) -> Callable[
    [Callable[Concatenate[Run, Path, Rest], None]], Callable[Concatenate[Run, Rest], Path]
]:
    """Make a function a stage; its arguments after the folder (names) follow `name` in the path."""

    def decorate(
        action: Callable[Concatenate[Run, Path, Rest], None],
    ) -> Callable[Concatenate[Run, Rest], Path]:
        @wraps(action)
        def call(run: Run, /, *arguments: Rest.args, **keywords: Rest.kwargs) -> Path:
            return run.up_to_date(
                "/".join((name, *map(str, arguments))),
                action.__module__,
                lambda folder: action(run, folder, *arguments, **keywords),
            )

        _STAGES[name] = call
        return call

    return decorate


def remembered(
    make: Callable[Concatenate[Run, Rest], Value],
) -> Callable[Concatenate[Run, Rest], Value]:
    """Make a function of a run compute its value once per run and arguments; see `Run.remember`."""

    @wraps(make)
    def call(run: Run, /, *arguments: Rest.args, **keywords: Rest.kwargs) -> Value:
        key = (make.__module__, make.__qualname__, arguments)
        return run.remember(key, lambda: make(run, *arguments, **keywords))

    return call


@cache
def code_digest(module: str) -> str:
    """Hash of the code of `module` and of what it imports; see `code_of`."""
    return _sha256(json.dumps(sorted(code_of(module).items())))


def code_of(module: str) -> dict[str, str]:
    """The code of `module` and of the pipeline's modules that it imports, by their names.

    Comments, docstrings and layout are left out.
    """
    own = module.rpartition(".")[0]
    trees: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = _source(name) if name.startswith((*_PIPELINE, own)) else None
        if name in trees or file is None:
            continue
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (
                ast.get_docstring(node, clean=False) is not None
            ):
                del node.body[0]
        trees[name] = ast.dump(tree)
    return trees


def _source(module: str) -> Path | None:
    """The file of a module; None where it is no module but a name in one."""
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec is not None and spec.origin is not None else None


@contextmanager
def progress_bar(total: int, name: str, *, unit: str) -> Iterator[Callable[[int], None]]:
    """Show a bar while the block runs; it yields the function that advances it."""
    with tqdm(total=total, desc=name, unit=f" {unit}", disable=None, leave=False) as bar:

        def advance(count: int) -> None:
            bar.update(count)

        yield advance


def say(line: str) -> None:
    """Print a line above the bars that are being shown."""
    tqdm.write(line)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write `content`, atomically."""
    write_atomic(file, json.dumps(content, indent=1) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file that a stage wrote."""
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def _read_json(file: Path) -> dict[str, Any]:
    """The same, empty where there is none or half of one."""
    try:
        return read_json(file)
    except (FileNotFoundError, ValueError):
        return {}


def _as_json(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=lambda model: model.model_dump(mode="json"))


def _sha256(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()
