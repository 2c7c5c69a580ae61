"""Calls of tools, told in the many ways in which servers tell them."""

from typing import Any

import pytest

from models.answer_format import ToolCall, join_calls
from models.errors import EngineFailed
from tests.models.engines.remote.asking import OFFERED, ask
from tests.models.engines.remote.bad_server import called, finish


def calls_of(*pieces: Any, reason: str = "tool_calls") -> tuple[ToolCall, ...]:
    """Return the calls that a server tells in `pieces`, one per event."""
    events = [{"choices": [{"delta": {"tool_calls": [piece]}}]} for piece in pieces]
    chunks = ask(*events, *finish(reason), tools=OFFERED)
    return join_calls(call for chunk in chunks for call in chunk.tool_calls)


def piece(
    name: str | None = None, arguments: Any = None, *, key: str | None = None, **more: Any
) -> dict[str, Any]:
    """Return a piece of a call; `key` is its id."""
    function = {"name": name, "arguments": arguments}
    told = {name: value for name, value in function.items() if value is not None}
    return {"function": told, **({"id": key} if key else {}), **more}


def test_a_call_in_the_older_way_is_a_call() -> None:
    """Servers from before tools tell the one function that they call."""
    older = [{"function_call": {"name": "find"}}, {"function_call": {"arguments": "{}"}}]
    chunks = ask(*({"choices": [{"delta": told}]} for told in older), *finish("function_call"))
    [call] = join_calls(call for chunk in chunks for call in chunk.tool_calls)
    assert (call.name, call.arguments, chunks[-1].finish_reason) == ("find", "{}", "tool_calls")


@pytest.mark.parametrize(
    "pieces",
    [
        # one index for all
        [piece("find", '{"x": 1}', key="a", index=0), piece("open", '{"y": 2}', key="b", index=0)],
        # no index, ids only with the first pieces
        [
            piece("find", '{"x"', key="a"),
            piece(None, ": 1}"),
            piece("open", '{"y"', key="b"),
            piece(None, ": 2}"),
        ],
        # interleaved by index
        [
            piece("find", "", key="a", index=0),
            piece("open", "", key="b", index=1),
            piece(None, '{"x": 1}', index=0),
            piece(None, '{"y": 2}', index=1),
        ],
        # interleaved by id, without an index
        [
            piece("find", '{"x"', key="a"),
            piece("open", '{"y"', key="b"),
            piece(None, ": 1}", key="a"),
            piece(None, ": 2}", key="b"),
        ],
        # id and name with every piece
        [
            piece("find", '{"x"', key="a", index=0),
            piece("find", ": 1}", key="a", index=0),
            piece("open", '{"y": 2}', key="b", index=1),
        ],
        # arguments as an object, and a name in two pieces
        [
            piece("fi", key="a", index=0),
            piece("nd", {"x": 1}, index=0),
            piece("open", {"y": 2}, key="b", index=1),
        ],
        # an id for each, and yet no index; nothing beside them
        [None, piece("find", {"x": 1}, key="a"), piece("open", {"y": 2}, key="b"), {}],
        # the id comes last
        [
            piece("find", '{"x": 1}', index=0),
            piece(None, "", key="a", index=0),
            piece("open", '{"y": 2}', key="b", index=1),
        ],
    ],
)
def test_calls_are_assembled_however_they_come(pieces: list[Any]) -> None:
    """Two calls come back whole, with the names and ids that the server sent."""
    assert [(c.id, c.name, c.arguments) for c in calls_of(*pieces)] == [
        ("a", "find", '{"x": 1}'),
        ("b", "open", '{"y": 2}'),
    ]


def test_calls_without_ids_or_arguments_get_them() -> None:
    """Whole calls one after another, as some servers send them, are told apart."""
    calls = calls_of(piece("find", '{"x": 1}'), piece("find", '{"x": 2}'), piece("open"))
    assert [(c.name, c.arguments) for c in calls] == [
        ("find", '{"x": 1}'),
        ("find", '{"x": 2}'),
        ("open", "{}"),
    ]
    assert len({call.id for call in calls}) == 3
    assert all(call.id for call in calls)


def test_calls_that_share_their_id_are_two() -> None:
    """A call whose arguments are whole does not go on, whatever the next one's id."""
    same = [piece("find", f'{{"x": {x}}}', key="a") for x in (1, 2)]
    assert [c.arguments for c in calls_of(*same)] == ['{"x": 1}', '{"x": 2}']


def test_calls_stream_as_they_come() -> None:
    """Pieces of arguments are shown at once, the first with the call's id and name."""
    events = [
        {"choices": [{"delta": {"tool_calls": [one]}}]}
        for one in (piece("find", "", key="a", index=0), piece(None, '{"x"'), piece(None, ": 1}"))
    ]
    shown = [c.tool_calls for c in ask(*events, *finish("tool_calls"), tools=OFFERED)]
    assert shown[1:] == [
        (ToolCall(id="a", name="find", arguments='{"x"'),),
        (ToolCall(id="", name="", arguments=": 1}"),),
        (),
    ]


def test_truncated_calls_say_so() -> None:
    """A call that the limit cut off is no whole call: the reason is told as it is."""
    events = [{"choices": [{"delta": {"tool_calls": [piece("find", '{"pa', key="a")]}}]}]
    chunks = ask(*events, *finish("length"), tools=OFFERED)
    assert chunks[-1].finish_reason == "length"
    assert [c.arguments for chunk in chunks for c in chunk.tool_calls] == ['{"pa']
    whole = ask(*events, *finish("stop"), tools=OFFERED)
    assert whole[-1].finish_reason == "tool_calls"


def test_calls_without_end_are_no_answer() -> None:
    """A server that repeats itself costs nobody the time to look through all that it called."""
    with pytest.raises(EngineFailed, match="more than 512 calls"):
        ask(*(called("find", "{}", index) for index in range(513)), *finish())
