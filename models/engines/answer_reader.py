"""Reads what an engine's model wrote: its reasoning, its answer's text and its calls apart.

Engines tell all of it as text, in chunks that may end anywhere. What belongs to the reasoning does
not depend on where they do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from models.answer_format import AnswerFormat, ReasoningTags
from models.engines.base import Chunk, GenerationRequest, Token
from models.engines.text import Vocabulary, overlap
from models.tool_formats import READERS

# No tag has more, with the blanks after it.
_LAST_TOKENS = 72


class AnswerReader:
    """Reads one answer to `request`; only conversations' answers are more than text.

    Some templates open the reasoning where the prompt ends; the model's `vocabulary` reads that.
    """

    def __init__(
        self, request: GenerationRequest, form: AnswerFormat, vocabulary: Vocabulary | None
    ) -> None:
        rendering, tools = request.rendering, request.tools
        tags = form.reasoning if rendering is not None else None
        self.opened = False
        if tags is not None:
            end = vocabulary.text(request.prompt_tokens[-_LAST_TOKENS:]) if vocabulary else ""
            self.opened = end.rstrip().endswith(tags.open)
            if rendering is not None and rendering.continue_final and request.messages:
                content = request.messages[-1]["content"]
                self.opened |= content.rfind(tags.open) > content.rfind(tags.close)
        self._thoughts = _ThoughtReader(tags, opened=self.opened) if tags else None
        self._counter = _ThoughtCounter(tags, opened=self.opened) if tags else None
        self._calls = None
        self._one_call = tools is not None and not tools.parallel
        self._num_calls = 0
        if tools is not None and form.calls is not None:
            names = [tool["function"]["name"] for tool in tools.functions]
            self._calls = READERS[form.calls](names)

    def read(self, chunk: Chunk) -> Chunk:
        """Return `chunk` with its text sorted out; why the answer ended may be a call."""
        reasoning, text, calls = chunk.reasoning, chunk.text, chunk.tool_calls
        ends, truncated = chunk.finish_reason is not None, chunk.finish_reason == "length"
        tokens, num_thoughts = chunk.tokens, chunk.reasoning_tokens
        if self._thoughts is not None and self._counter is not None:
            thought, text = self._thoughts.push(text)
            reasoning += thought
            if ends:
                last = self._thoughts.finish()
                reasoning, text = reasoning + last[0], text + last[1]
            tokens = tuple(self._counter.mark(tokens))
            num_thoughts = (num_thoughts or self._counter.num_tokens) if ends else None
        if self._calls is not None:
            text, calls = self._calls.push(text)
            if ends:
                rest, more = self._calls.finish(truncated=truncated)
                text, calls = text + rest, (*calls, *more)
            if self._one_call:
                calls = tuple(call for call in calls if call.index == 0)
        self._num_calls += len(calls)
        called = self._num_calls and chunk.finish_reason == "stop"
        return replace(
            chunk,
            text=text,
            reasoning=reasoning,
            tool_calls=calls,
            tokens=tokens,
            reasoning_tokens=num_thoughts,
            finish_reason="tool_calls" if called else chunk.finish_reason,
        )


class _ThoughtReader:
    """Splits text into reasoning and the rest; blanks around the reasoning belong to neither."""

    def __init__(self, tags: ReasoningTags, *, opened: bool) -> None:
        self._tags = tags
        self._held = ""
        self._state = "inside" if opened else "before"
        self._begun = False

    def push(self, text: str) -> tuple[str, str]:
        """Return what `text` makes certain."""
        if self._state == "over":
            return "", text
        self._held += text
        reasoning = ""
        if self._state == "before":
            start = self._held.lstrip()
            if self._tags.open.startswith(start):
                if start != self._tags.open:
                    return "", ""
            elif not start.startswith(self._tags.open):
                return "", self._rest()
            self._state, self._held = "inside", start[len(self._tags.open) :]
        if self._state == "inside":
            reasoning = self._inside()
        if self._state == "after":
            self._held = self._held.lstrip()
            if self._held:
                return reasoning, self._rest()
        return reasoning, ""

    def finish(self) -> tuple[str, str]:
        """Return what was held back."""
        if self._state == "before":
            return "", self._rest()
        return (self._held.rstrip(), "") if self._state == "inside" else ("", "")

    def _inside(self) -> str:
        if not self._begun:
            self._held = self._held.lstrip()
            self._begun = bool(self._held)
        at = self._held.find(self._tags.close)
        if at >= 0:
            told, self._held = self._held[:at], self._held[at + len(self._tags.close) :]
            self._state = "after"
            return told.rstrip()
        certain = len(self._held) - overlap(self._held, self._tags.close)
        certain = len(self._held[:certain].rstrip())
        told, self._held = self._held[:certain], self._held[certain:]
        return told

    def _rest(self) -> str:
        self._state, told, self._held = "over", self._held, ""
        return told


class _ThoughtCounter:
    """Marks and counts the tokens up to the end of the reasoning, tags included.

    Of an opening tag that several tokens spell, the first ones are counted and not marked: when
    they are told, they may still be the answer.
    """

    def __init__(self, tags: ReasoningTags, *, opened: bool) -> None:
        self.num_tokens = 0
        self._open, self._close = tags.open.encode(), tags.close.encode()
        self._inside, self._over = opened, False
        self._raw = b""
        self._num_pending = 0

    def mark(self, tokens: tuple[Token, ...]) -> Iterator[Token]:
        """Yield `tokens`, those of the reasoning marked as such."""
        for token in tokens:
            thought = self._is_thought(token.raw)
            self.num_tokens += thought
            yield replace(token, thought=True) if thought else token

    def _is_thought(self, raw: bytes) -> bool:
        if self._over:
            return False
        self._raw += raw
        if not self._inside:
            start = self._raw.lstrip()
            self._inside = start.startswith(self._open)
            self.num_tokens += self._num_pending if self._inside else 0
            self._num_pending += bool(start)
            self._over = not self._inside and not self._open.startswith(start)
            self._raw = start.removeprefix(self._open)
        elif self._close in self._raw:
            self._over = True
        else:
            self._raw = self._raw[-len(self._close) :]
            return True
        return self._inside
