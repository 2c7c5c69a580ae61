"""Reads a Dockerfile, as far as ours goes."""

from __future__ import annotations

import fnmatch
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Stage:
    """One FROM and what follows it; `base` is an image or another stage's name."""

    name: str
    base: str
    steps: list[tuple[str, str]] = field(default_factory=list)

    def all(self, keyword: str) -> list[str]:
        """Return the arguments of every step of that kind."""
        return [argument for step, argument in self.steps if step == keyword]


def read_stages(file: Path) -> dict[str, Stage]:
    """Return the stages by name; steps on several lines are joined, arguments filled in."""
    text = re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE)
    text = re.sub(r"\\\n\s*", " ", text)
    stages: dict[str, Stage] = {}
    arguments: dict[str, str] = {}
    current: Stage | None = None
    for line in filter(None, map(str.strip, text.splitlines())):
        keyword, _, rest = line.partition(" ")
        if current is None and keyword == "ARG":
            name, _, value = rest.partition("=")
            arguments[name] = value
        elif keyword == "FROM":
            base, _, name = rest.partition(" AS ")
            for argument, value in arguments.items():
                base = base.replace(f"${{{argument}}}", value)
            current = stages[name] = Stage(name=name, base=base)
        else:
            assert current is not None, line
            current.steps.append((keyword, rest.strip()))
    return stages


def lineage(stages: dict[str, Stage], name: str) -> list[Stage]:
    """Return the stage and those it is built on, the last one first."""
    found = [stages[name]]
    while found[-1].base in stages:
        found.append(stages[found[-1].base])
    return found


def exec_form(argument: str) -> list[str]:
    """Return the words of a CMD, ENTRYPOINT or HEALTHCHECK in exec form."""
    words: list[str] = json.loads(argument[argument.index("[") :])
    return words


def copy_context(root: Path, stage: Stage, target: Path) -> None:
    """Copy into `target` what the stage's COPY steps take, less what .dockerignore hides."""
    shown, hidden = _ignore_rules(root / ".dockerignore")
    for argument in stage.all("COPY"):
        *sources, destination = argument.split()
        for source in sources:
            assert source in shown, f".dockerignore hides {source}"
            into = target / source if destination == "./" else target / destination
            if (root / source).is_dir():
                shutil.copytree(root / source, into, ignore=shutil.ignore_patterns(*hidden))
            else:
                shutil.copy(root / source, into)


def _ignore_rules(file: Path) -> tuple[set[str], list[str]]:
    """Return what is shown by name, and the patterns hidden at any depth; all else is hidden."""
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    shown = {line[1:] for line in lines if line.startswith("!")}
    hidden = [line.removeprefix("**/") for line in lines if fnmatch.fnmatch(line, "[*][*]/*")]
    return shown, hidden
