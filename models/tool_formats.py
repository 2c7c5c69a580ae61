"""How models write calls of tools, format by format, and how that is read.

    hermes        <tool_call>{"name": "f", "arguments": {}}</tool_call>      Qwen, Hermes
    llama3-json   {"name": "f", "parameters": {}}                            Llama 3
    mistral       [TOOL_CALLS][{"name": "f", "arguments": {}}]               Mistral
                  [TOOL_CALLS]f[ARGS]{}                                      newer ones
    pythonic      [f(a=1), g()]                                              Llama 3.2 and 4

The chat template tells a model of its tools. Its answer is read character by character, so that it
does not matter where a stream is cut. Arguments in JSON are handed on as they come, those in Python
once their call is whole; what turns out to be no call stays text.
"""

from __future__ import annotations

import ast
import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import ClassVar

from models.answer_format import FormatName, ToolCall, join_calls
from policies.json_text import read_json_text

_ARGUMENTS = ("arguments", "parameters")


class CallReader(ABC):
    """Reads one answer that may call `functions`, names, in the format of its subclass.

    `openers` begin a call anywhere, `at_start` where the answer begins with it: there only the name
    of a function on offer makes a call. `separators` lead to the next call, `closers` to text,
    and `after` a call may stand what means nothing.
    Blanks before a call belong to it.
    """

    openers: ClassVar[tuple[str, ...]] = ()
    at_start: ClassVar[str] = ""
    separators: ClassVar[tuple[str, ...]] = ()
    closers: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[str] = ""

    def __init__(self, functions: Collection[str]) -> None:
        self._functions = functions
        self._state: Callable[[str], None] = self._in_text
        self._held = ""  # may begin an opener
        self._blanks = ""  # belong to the text if more of it comes
        self._raw = ""  # looks like a call and is not known to be one
        self._word = ""  # a name or a mark, as far as it came
        self._text = ""
        self._pieces: list[ToolCall] = []
        self._has_text = False
        self._num_calls = 0

    def push(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """Return what `text` makes certain: text, and pieces of calls."""
        for character in text:
            self._state(character)
        told = self._text, join_calls(self._pieces)
        self._text, self._pieces = "", []
        return told

    def finish(self, *, truncated: bool) -> tuple[str, tuple[ToolCall, ...]]:
        """Return what was held back; a call's head is no text where the answer is `truncated`."""
        if self._raw and not truncated:
            self._no_call()
        if not self._raw and (self._held or not self._num_calls):
            self._text += self._blanks + self._held
        return self.push("")

    @abstractmethod
    def _in_call(self, character: str) -> None:
        """Take a character after an opener, or after what separates two calls."""

    def _in_text(self, character: str) -> None:
        self._held += character
        starts = (self.at_start,) if not self._has_text and not self._num_calls else ()
        openers = (*self.openers, *filter(None, starts))
        while self._held and not any(each.startswith(self._held) for each in openers):
            self._tell(self._held[0])
            self._held = self._held[1:]
            openers = self.openers
        if self._held in openers:
            opener, self._held, self._state = self._held, "", self._in_call
            if opener == self.at_start:
                self._state(opener)  # which is a part of the call
            else:
                self._raw = opener

    def _tell(self, character: str) -> None:
        if character.isspace():
            self._blanks += character
        else:
            self._text += self._blanks + character
            self._blanks, self._has_text = "", True

    def _no_call(self) -> None:
        self._text += self._blanks + self._raw
        self._blanks = self._raw = self._word = ""
        self._has_text, self._state = True, self._in_text

    def _is_called(self, name: str | None) -> bool:
        return bool(name) and (not self.at_start or name in self._functions)

    def _begin(self, name: str) -> None:
        self._blanks = self._raw = self._word = ""
        identity = secrets.token_hex(5)[:9]  # Mistral's templates take no other length
        self._pieces.append(ToolCall(index=self._num_calls, id=identity, name=name, arguments=""))
        self._num_calls += 1

    def _argue(self, arguments: str) -> None:
        index = self._num_calls - 1
        self._pieces.append(ToolCall(index=index, id="", name="", arguments=arguments))

    def _after_call(self, character: str) -> None:
        """Look for what ends a call, or leads to the next."""
        word = self._word + character
        if word in self.separators or word in self.closers:
            self._word = self._blanks = ""
            self._state = self._in_call if word in self.separators else self._in_text
        elif any(each.startswith(word) for each in (*self.separators, *self.closers)):
            self._word = word
        elif word.isspace() or word in self.after:
            self._blanks += word if word.isspace() else ""
        else:
            self._word, self._state = "", self._in_text
            for each in word:
                self._state(each)


class _JsonReader(CallReader):
    """A call is an object of name and arguments, or a name and an object of arguments."""

    bare_names: ClassVar[bool] = False
    before: ClassVar[str] = ""
    _object: _JsonObject
    _argued = False

    def _in_call(self, character: str) -> None:
        self._raw += character
        if character == "{":
            self._object, self._argued = _JsonObject(), False
            self._object.push(character)
            self._state = self._in_object
        elif self.bare_names and (character.isalnum() or character == "_"):
            self._word, self._state = character, self._in_name
        elif not character.isspace() and character not in self.before:
            self._no_call()

    def _in_name(self, character: str) -> None:
        self._raw += character
        if character == "{":
            self._begin(re.split(r"\[|\s", self._word)[0])
            self._object = _JsonObject()
            self._state = self._in_arguments
            self._in_arguments(character)
        elif character in "\n\r\"'":
            self._no_call()
        else:
            self._word += character

    def _in_arguments(self, character: str) -> None:
        self._argue(character)
        self._object.push(character)
        if self._object.done:
            self._state = self._after_call

    def _in_object(self, character: str) -> None:
        found = self._object
        grown = found.push(character)
        if not self._raw:  # the call has begun
            if found.key in _ARGUMENTS and found.value.startswith("{"):
                self._argue(grown)
                self._argued = True
        elif "name" in found.values:
            name = _string(found.values["name"])
            self._raw += character
            if name is None or not self._is_called(name):
                self._no_call()
                return
            self._begin(name)
        else:
            self._raw += character
            if found.done or found.broken:
                self._no_call()
                return
        if found.done and not self._raw:
            if not self._argued:
                told = [found.values[key] for key in _ARGUMENTS if key in found.values]
                self._argue(_plain(told[0] if told else ""))
            self._state = self._after_call


class _JsonObject:
    """One JSON object as it comes: whole values as they were written, and the one at hand.

    `broken` says that it is no JSON, as far as one looks at keys and commas.
    """

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.key: str | None = None
        self.value = ""
        self.done = self.broken = False
        self._depth = 0
        self._quoted = self._escaped = False

    def push(self, character: str) -> str:
        """Take the next character; return what it adds to the value at hand."""
        if self._quoted:
            self._quoted = self._escaped or character != '"'
            self._escaped = character == "\\" and not self._escaped
        elif character == '"':
            self._quoted = True
        elif character in "{[":
            self._depth += 1
            if self._depth == 1:
                return ""
        elif character in "}]":
            self._depth -= 1
            if self._depth == 0:
                self._close()
                self.done = True
                return ""
        elif self._depth == 1 and character == ",":
            self._close()
            return ""
        elif self._depth == 1 and character == ":" and self.key is None:
            self.key, self.value = _string(self.value), ""
            self.broken |= self.key is None
            return ""
        elif self._depth == 1 and character.isspace():
            return ""
        self.value += character
        return character

    def _close(self) -> None:
        if self.key is not None:
            self.values[self.key] = self.value.strip()
        else:
            self.broken |= bool(self.value.strip())
        self.key, self.value = None, ""


class Hermes(_JsonReader):
    """Qwen's and Hermes' format, which many others follow."""

    openers = ("<tool_call>",)
    closers = ("</tool_call>",)


class Llama3(_JsonReader):
    """Llama 3's format: the object alone, one for each answer."""

    openers = ("<|python_tag|>",)
    at_start = "{"
    separators = (";",)


class Mistral(_JsonReader):
    """Mistral's format, in which newer models write names outside of the objects."""

    openers = ("[TOOL_CALLS]",)
    before = "["
    separators = (",",)
    after = "]"
    bare_names = True


class Pythonic(CallReader):
    """A list of Python's calls with keyword arguments, as Llama 3.2 and 4 write them."""

    openers = ("<|python_start|>",)
    at_start = "["
    separators = (",",)
    closers = ("<|python_end|>",)
    after = "]"
    _depth = 0
    _quote = ""
    _escaped = False

    def _in_call(self, character: str) -> None:
        self._raw += character
        if character == "(" and self._is_called(self._word):
            self._depth, self._quote, self._state = 1, "", self._in_arguments
        elif character.isalnum() or character in "_-.":
            self._word += character
        elif not (character.isspace() or (character == "[" and not self._word)):
            self._no_call()

    def _in_arguments(self, character: str) -> None:
        self._raw += character
        if self._quote:
            ends = character == self._quote and not self._escaped
            self._quote = "" if ends else self._quote
            self._escaped = character == "\\" and not self._escaped
        elif character in "\"'":
            self._quote = character
        elif character in "([{":
            self._depth += 1
        elif character in ")]}":
            self._depth -= 1
        if self._depth:
            return
        start = self._raw.index(self._word) + len(self._word)
        arguments = _keywords(self._raw[start:])
        if arguments is None:
            self._no_call()
        else:
            self._begin(self._word)
            self._argue(arguments)
            self._state = self._after_call


READERS: dict[FormatName, type[CallReader]] = {
    "hermes": Hermes,
    "llama3-json": Llama3,
    "mistral": Mistral,
    "pythonic": Pythonic,
}


def _string(written: str) -> str | None:
    """Return the string that a JSON text says; None if it says none."""
    try:
        found = read_json_text(written)
    except ValueError:
        return None
    return found if isinstance(found, str) else None


def _plain(written: str) -> str:
    """Return arguments that no object told at once: some models quote it, or leave it out."""
    quoted = written.startswith('"')
    return _string(written) or "{}" if quoted or written in ("", "null") else written


# What Python's strings know behind a backslash, and JSON's.
_ESCAPES = "\\\n'\"abfnrtvx01234567NuU"


def _keywords(written: str) -> str | None:
    """Return the arguments of a call, "(a=1)", as JSON; None if they are not all literals by name.

    Values may be JSON's own, whose names for true, false and null Python lacks.
    """
    clean = re.sub(r"(?s)\\(.)", lambda m: m[0] if m[1] in _ESCAPES else _unescaped(m[1]), written)
    try:
        call = ast.parse(f"f{clean}", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or any(keyword.arg is None for keyword in call.keywords):
            return None
        found = {
            str(keyword.arg): ast.literal_eval(_JsonNames().visit(keyword.value))
            for keyword in call.keywords
        }
        return json.dumps(found)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _unescaped(character: str) -> str:
    return character if character == "/" else f"\\\\{character}"


class _JsonNames(ast.NodeTransformer):
    """Makes values of the names true, false and null."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        """Return the value that JSON means by a name."""
        names = {"true": True, "false": False, "null": None}
        return ast.Constant(names[node.id]) if node.id in names else node
