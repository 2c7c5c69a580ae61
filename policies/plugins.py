"""Implementations found by name: Shoal's own, and those that other distributions bring along.

Another distribution names its own in an entry point group of its metadata, and needs no line here:

    [project.entry-points."shoal.engines"]
    echo = "my_package.echo:KIND"

Nothing is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, Protocol, TypeVar

from pydantic import ValidationError

from policies.errors import PolicyError
from policies.validation import Settings, first_problem, short

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


class HasSettings(Protocol):
    """A kind that a specification names, and the schema of the keys beside it."""

    @property
    def settings(self) -> type[Settings]:
        """The keys."""
        ...


K = TypeVar("K", bound=HasSettings)


def read_spec(kinds: Plugins[K], spec: Mapping[str, Any]) -> tuple[K, Any]:
    """Return the kind that `spec` names, and its settings: an instance of the kind's schema.

    Raises `PolicyError` that names the key, the value and what is allowed.
    """
    name = spec.get("kind")
    if not isinstance(name, str):
        allowed = ", ".join(kinds.names())
        raise PolicyError(f"kind: {short(name)} is unknown; allowed are {allowed}")
    try:
        kind = kinds.load(name)
    except PluginError as error:
        raise PolicyError(f"kind: {error}") from None
    body = {key: value for key, value in spec.items() if key != "kind"}
    try:
        return kind, kind.settings.model_validate(body)
    except ValidationError as error:
        keys = kind.settings.model_fields
        raise PolicyError(first_problem(error, where=name, keys=keys)) from None
