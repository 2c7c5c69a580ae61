"""Implementations found by name: Shoal's own, and those that other distributions bring along.

Another distribution names its own in an entry point group of its metadata, and needs no line here:

    [project.entry-points."shoal.engines"]
    echo = "my_package.echo:KIND"

Nothing is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

T = TypeVar("T")


class PluginError(ValueError):
    """A name that nothing goes by, or something that cannot be imported: says which and why."""


class Plugins(Generic[T]):
    """Everything of one group, by name; Shoal's own names cannot be taken by others."""

    def __init__(self, group: str, expected: type[T], own: Mapping[str, str]) -> None:
        """`own` maps names to "module:attribute"; each is an `expected`, as others' must be."""
        self._group = group
        self._expected = expected
        self._own = {name: EntryPoint(name, value, group) for name, value in own.items()}

    def names(self) -> tuple[str, ...]:
        """Return all names, sorted."""
        return tuple(sorted({*self._own, *entry_points(group=self._group).names}))

    def load(self, name: str) -> T:
        """Import what goes by `name`; raises `PluginError`."""
        entry = self._own.get(name)
        if entry is None:
            found = tuple(entry_points(group=self._group, name=name))
            if not found:
                raise PluginError(f"{name!r} is unknown; allowed are {', '.join(self.names())}")
            if len(found) > 1:
                values = ", ".join(each.value for each in found)
                raise PluginError(f"{name!r} is offered more than once: {values}; remove one")
            [entry] = found
        try:
            loaded = entry.load()
        except (ImportError, AttributeError) as error:
            raise PluginError(
                f"{name!r} ({entry.value}, entry point of {self._group}) cannot be imported: "
                f"{error}"
            ) from error
        if not isinstance(loaded, self._expected):
            raise PluginError(
                f"{name!r} ({entry.value}, entry point of {self._group}) is a "
                f"{type(loaded).__name__}, not a {self._expected.__name__}"
            )
        return loaded
