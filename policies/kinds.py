"""Kinds: implementations found by name, and the settings beside a name in a file.

Another distribution names its own in an entry point group of its metadata, and needs no line here:

    [project.entry-points."shoal.engines"]
    echo = "my_package.echo:KIND"

Nothing is imported before it is used. Settings refuse what they do not know, in sentences that name
the key, the value and what is allowed.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Hashable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any, Generic, Protocol, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from policies.errors import PolicyError

# What such keys hold is not shown: an address may have a password in it.
_SECRET = re.compile("url|token|secret|password")
# Sums of so many rows as anybody keeps then fit 64 bits, in which databases and engines count.
MOST_COUNT = 2**31 - 1
Count = Annotated[int, Field(ge=1, le=MOST_COUNT)]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 8


class Strict(BaseModel):
    """Settings that refuse what they do not know, and stay as they are."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Settings(Strict):
    """Settings as a file or a request gives them: no unknown keys, no conversions, finite."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


Schema = TypeVar("Schema", bound=BaseModel)


def explain(error: ValidationError, *, whole: str = "the file") -> str:
    """Return a pydantic error as sentences that name the key, the value and what is allowed.

    `whole` is what holds the keys, where one is wrong with no key.
    """
    lines = []
    for detail in error.errors(include_url=False):
        where = ".".join(str(part) for part in detail["loc"]) or whole
        if detail["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key")
        elif detail["type"] == "missing":
            lines.append(f"{where}: the key is missing")
        else:
            told = detail["msg"].removeprefix("Value error, ")  # pydantic's word for our own checks
            got = "" if _SECRET.search(where) else f", got {short(detail['input'])}"
            lines.append(f"{where}: {told}{got}")
    return "; ".join(lines)


class _Loader(yaml.SafeLoader):
    """Refuses what stands twice in one mapping, of which YAML's own loader takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        known: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in known:
                problem = f"the key {key.value!r} stands twice in one mapping"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            known.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:  # noqa: ANN401 - any value that YAML can hold
    """Return what a text says that a person wrote; raises `yaml.YAMLError` that says where not."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    finally:
        loader.dispose()


def read_yaml(file: Path, schema: type[Schema], *, refused: type[ValueError]) -> Schema:
    """Return what a YAML file says, in the form of `schema`.

    Raises `refused` that names the file, the key, the value and what is allowed.
    """
    try:
        data = load_yaml(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise refused(f"{file} is not valid YAML: {error}") from None
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise refused(f"{file}: {explain(error)}") from None


def first_problem(error: ValidationError, *, where: str, keys: Iterable[str]) -> str:
    """Return what is wrong first with the object at `where`, whose `keys` are allowed.

    Names the key, the value and what is allowed. A `PolicyError` from inside speaks for itself.
    """
    detail = error.errors(include_url=False)[0]
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, PolicyError):
        return str(cause)
    *above, key = detail["loc"] or ("",)
    parent = ".".join((where, *map(str, above)))
    if detail["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{parent}: the key {key!r} is missing"
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        allowed = "" if above else f"; allowed are {', '.join(keys)}"
        return f"{parent}: the key {short(key)} is unknown{allowed}"
    told = detail["msg"].replace("Input should", "it should").replace("valid tuple", "list")
    return f"{parent}.{key}: {short(detail['input'])} is refused: {told}"


def short(value: object) -> str:
    """Return `value` as an error shows it, cut short where it is long."""
    return _SHORT.repr(value)


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
