"""Reasoning, text and calls of an answer, told apart as they come."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.answer_format import AnswerFormat, ReasoningTags, Tools
from models.chat_template import Rendering
from models.engines.answer_reader import AnswerReader
from models.engines.base import Chunk, GenerationRequest, Token

FORM = AnswerFormat(calls="hermes", reasoning=ReasoningTags(open="<think>", close="</think>"))
TOOL = {"type": "function", "function": {"name": "add"}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def _request(**fields: Any) -> GenerationRequest:
    fields = {"rendering": Rendering(), **fields}
    return GenerationRequest(request_id="r", prompt_tokens=(1,), members=("m",), **fields)


def _read(pieces: Sequence[str], request: GenerationRequest, reason: Any = "stop") -> list[Chunk]:
    """Read pieces that are one token each; the last is the end's, without text."""
    reader = AnswerReader(request, FORM, None)
    tokens = [Token(token_id=1, raw=p.encode(), logprob=-1.0) for p in (*pieces, "")]
    chunks = [Chunk(text=token.raw.decode(), tokens=(token,)) for token in tokens]
    return [*map(reader.read, chunks[:-1]), reader.read(replace(chunks[-1], finish_reason=reason))]


@settings(max_examples=20)
@given(data=st.data())
@pytest.mark.parametrize(
    ("written", "reasoning", "text", "calls"),
    [
        ("<think>\nTwo and two.\n</think>\n\nFour.", "Two and two.", "Four.", 0),
        ("\n<think></think>Four.", "", "Four.", 0),
        ("Four, I <think>.", "", "Four, I <think>.", 0),
        ("<thin", "", "<thin", 0),
        ("<think>Hm, a < b", "Hm, a < b", "", 0),
        (f"<think>I call.</think>\n{CALL}", "I call.", "", 1),
        (f"<think>Not yet: {CALL}</think>No.", f"Not yet: {CALL}", "No.", 0),
    ],
)
def test_thoughts_come_apart(
    data: st.DataObject, written: str, reasoning: str, text: str, calls: int
) -> None:
    """Wherever a stream is cut; a call within the thoughts is none."""
    cuts = sorted(data.draw(st.sets(st.integers(0, len(written)))))
    pieces = [written[a:b] for a, b in zip([0, *cuts], [*cuts, len(written)], strict=True)]
    chunks = _read(pieces, _request(tools=Tools(functions=(TOOL,))))
    assert "".join(chunk.reasoning for chunk in chunks) == reasoning
    assert "".join(chunk.text for chunk in chunks) == text
    assert chunks[-1].finish_reason == ("tool_calls" if calls else "stop")


def test_reasoning_tokens_are_counted() -> None:
    """From the opening tag to the closing one; the tokens themselves say so."""
    chunks = _read(["<think>", "a", "b", "</think>", "\n", "four"], _request())
    assert chunks[-1].reasoning_tokens == 4
    assert [chunk.tokens[0].thought for chunk in chunks] == [True] * 4 + [False] * 3
    assert _read(["four"], _request())[-1].reasoning_tokens == 0


def test_a_continued_turn_goes_on_thinking() -> None:
    """Where the client's own beginning of the answer has an open tag, it is not written again."""
    messages = ({"role": "assistant", "content": "<think>One"},)
    rendering = Rendering(continue_final=True)
    [first, *_] = _read(
        [" and two.", "</think>Three."], _request(messages=messages, rendering=rendering)
    )
    assert first.reasoning == " and two."[1:]


def test_what_is_no_conversation_stays_as_it_is() -> None:
    """A completion's text is nobody's answer."""
    chunks = _read(["<think>", "a", "</think>"], _request(rendering=None))
    assert "".join(chunk.text for chunk in chunks) == "<think>a</think>"
    assert chunks[-1].reasoning_tokens is None


def test_one_call_where_one_is_wanted() -> None:
    """Of several calls the first counts unless the client takes them in parallel."""
    tools = Tools(functions=(TOOL,), parallel=False)
    chunks = _read([CALL, CALL], _request(tools=tools))
    assert {call.index for chunk in chunks for call in chunk.tool_calls} == {0}


def test_a_truncated_call_ends_by_length() -> None:
    """What there is of the call is told, and why it ended."""
    chunks = _read([CALL[:40]], _request(tools=Tools(functions=(TOOL,))), reason="length")
    assert chunks[-1].finish_reason == "length"
    assert "".join(call.name for chunk in chunks for call in chunk.tool_calls) == "add"
