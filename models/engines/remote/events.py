"""What a server sends, cut into events: JSON objects, and what is none.

All of it is bounded: a server that sends without end, or a small body that unpacks to a huge one,
fails the request that asked and no other.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

from policies.json_text import read_json_text

DONE = "[DONE]"
_LINE_END = re.compile(r"\r\n|\r|\n")
_MOST_CHARACTERS = 16 * 2**20  # of one event; whoever sends more sends no answer


async def read_events(parts: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any] | str]:
    """Yield an event stream's JSON objects, and as text its end (`DONE`) and what cannot be read.

    Lines end at CR, LF or both, and nowhere else: texts may hold U+2028 and its kin as they are.
    A line that is a whole object is an event, whether a blank line follows or not; data over
    several lines are joined up to a blank one, as the standard says. What begins no object is a
    heartbeat. An event of type error is an object with the key error.
    """
    kind, data, num_characters = "", list[str](), 0
    async for line in _lines(parts):
        name, _, value = line.partition(":")
        if name == "event":
            kind = value.strip()
        elif name == "data" and not data:
            value = value.strip()
            found = read_object(value)
            if found is not None:
                yield _typed(found, kind)
            elif value == DONE:
                yield DONE
            elif value.startswith("{"):
                data, num_characters = [value], len(value)
        elif name == "data":
            data.append(value)
            num_characters += len(value) + 1
            if num_characters > _MOST_CHARACTERS:
                break
        elif not line:
            if data:
                yield _whole(data, kind)
            kind, data = "", []
    if data:
        yield _whole(data, kind)


def _whole(data: Sequence[str], kind: str) -> dict[str, Any] | str:
    """Return what an event of several lines says, as text where that is no object."""
    text = "\n".join(data)
    found = read_object(text)
    return text if found is None else _typed(found, kind)


def _typed(found: dict[str, Any], kind: str) -> dict[str, Any]:
    return {"error": found} if kind == "error" and "error" not in found else found


def read_whole(body: bytes | bytearray) -> dict[str, Any] | None:
    """Return the one object that a server tells that does not stream; None if it is none."""
    return read_object(body.decode("utf-8-sig", errors="replace"))


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[str]:
    decode = codecs.getincrementaldecoder("utf-8-sig")(errors="replace").decode
    held = ""
    async for part in parts:
        text = decode(part)
        held += text
        if "\n" not in text and "\r" not in text and len(held) <= _MOST_CHARACTERS:
            continue
        # A CR at the end may be half of a CR LF.
        whole = held[:-1] if held.endswith("\r") else held
        *lines, rest = _LINE_END.split(whole)
        held = rest + held[len(whole) :]
        if len(held) > _MOST_CHARACTERS:
            yield "data: {"  # cannot be read, which says what is wrong
            return
        for line in lines:
            yield line
    for line in _LINE_END.split(held):
        yield line


def read_object(text: str) -> dict[str, Any] | None:
    """Return the one object that a text is; None where it is none."""
    try:
        found = read_json_text(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
