"""Policies written into a pool file; whatever else it says, comments too, stays to the letter."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from models.errors import PoolError
from policies.files import write_atomic


def write_policies(file: Path, specs: Mapping[str, Mapping[str, Any]]) -> None:
    """Put policies into a pool file: new ones come first, of one it has the settings that differ.

    Raises:
        PoolError: the file is laid out so that it would not say then what it should; it is left
            alone.
    """
    before = file.read_text(encoding="utf-8")
    wanted = yaml.safe_load(before)
    known = wanted.get("policies") or {}
    merged = {name: {**known.get(name, {}), **spec} for name, spec in specs.items()}
    wanted["policies"] = {**known, **merged}
    fresh = {name: spec for name, spec in specs.items() if name not in known}
    after = before
    for start, end, text in sorted(_changes(before, specs, fresh), reverse=True):
        after = after[:start] + text + after[end:]
    try:
        says = yaml.safe_load(after)
    except yaml.YAMLError:  # a pool in JSON, for instance
        says = None
    if says != wanted:
        raise PoolError(
            f"{file} is laid out so that policies cannot be written into it; its policies should "
            f"have:\n{as_yaml(specs)}"
        )
    write_atomic(file, after)


def _changes(
    text: str, specs: Mapping[str, Mapping[str, Any]], fresh: Mapping[str, Any]
) -> Iterator[tuple[int, int, str]]:
    """Yield what to write from where to where, by YAML's marks."""
    root = yaml.compose(text)
    policies = _pairs(root).get("policies")
    if policies is None:
        yield len(text.rstrip("\n")), len(text), "\npolicies:\n" + _block(fresh, 2)
        return
    _, theirs = policies
    if not _pairs(theirs):  # `policies: {}`: there are none yet
        start, end = theirs.start_mark.index, theirs.end_mark.index
        yield len(text[:start].rstrip()), end, "\n" + _block(fresh, 2).rstrip()
        return
    yield from _added(theirs, fresh)
    for name, (_, one) in _pairs(theirs).items():
        had = _pairs(one)
        wanted = specs.get(name, {})
        yield from _added(one, {key: wanted[key] for key in wanted if key not in had})
        for key, (start, value) in had.items():
            if key in wanted and yaml.safe_load(yaml.serialize(value)) != wanted[key]:
                # A block ends, by its mark, where the next begins: what stands between is not its.
                between = text[start.index : value.end_mark.index].splitlines(keepends=True)
                while between[-1].strip() == "" or between[-1].lstrip().startswith("#"):
                    between.pop()
                end = start.index + len("".join(between).rstrip("\n"))
                block = _block({key: wanted[key]}, start.column)
                yield start.index, end, block.strip()


def _added(mapping: yaml.Node, content: Mapping[str, Any]) -> Iterator[tuple[int, int, str]]:
    """Yield what puts `content` first into a mapping that has something."""
    if content:
        first = mapping.start_mark
        at = first.index - first.column
        yield at, at, _block(content, first.column)


def _pairs(node: yaml.Node | None) -> dict[str, tuple[yaml.Mark, yaml.Node]]:
    """Return where each of a mapping's keys stands, and its value."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return {key.value: (key.start_mark, value) for key, value in pairs}


def _block(content: Mapping[str, Any], indent: int) -> str:
    """Return `content` as YAML, each line `indent` columns in."""
    lines = as_yaml(content).splitlines(keepends=True)
    return "".join(" " * indent + line for line in lines)


def as_yaml(content: Mapping[str, Any]) -> str:
    """Return `content` as YAML in which what occurs twice is written out twice, without anchors."""
    plain = json.loads(json.dumps(dict(content)))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
