"""What the events of a server's answer add to it.

Servers differ, and a good answer is believed however it is told: what an event lacks is left out,
what it has too much is ignored, and only an error, a cut stream or an event that cannot be read
fails.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.answer_format import ToolCall
from models.engines.base import Chunk, FinishReason, GenerationRequest, Token, TopLogprob
from models.engines.remote.events import read_object
from models.engines.remote.failures import AttemptFailed, broke_off, from_event, unreadable
from models.errors import EngineFailed, RequestError
from policies.json_text import UNREADABLE, whole_text

_BYTES = re.compile(r"bytes:(\\x[0-9a-fA-F]{2})+")  # as OpenAI writes them
# No context is longer; a greater count is a server's mistake, which nobody shall pay for.
_MOST_TOKENS = 10_000_000
_MOST_CALLS = 512  # of one answer; whoever makes more repeats itself
# What servers call the ends that are not "stop", in lower case; every other word means that.
_ENDS: dict[str, FinishReason] = {
    **dict.fromkeys(("length", "max_tokens", "max_output_tokens", "model_length"), "length"),
    **dict.fromkeys(
        ("content_filter", "safety", "recitation", "blocklist", "prohibited_content", "sensitive"),
        "content_filter",
    ),
}
# What others than OpenAI call the prompt's tokens that a cache had: DeepSeek, Anthropic, Moonshot.
_CACHED = ("prompt_cache_hit_tokens", "cache_read_input_tokens", "cached_tokens")
_BREAKS = (
    *("error", "abort", "aborted", "cancelled", "timeout", "network_error"),
    "insufficient_system_resource",
)
# What some servers write into every event but the last, in place of null.
_NO_REASON = ("", "null", "none")
_LEAST_LOGPROB = -9999.0  # what OpenAI tells of a token that cannot come
# A token without text: the end of sequence, hidden reasoning, a piece of a tool call.
_HIDDEN = Token(token_id=0, raw=b"", logprob=None)


@dataclass(kw_only=True)
class _Call:
    """A call as far as it came; `num_shown` characters of the arguments are with the client."""

    index: int
    number: object
    id: str = ""
    name: str = ""
    arguments: str = ""
    num_shown: int | None = None

    def piece(self) -> ToolCall:
        """Return what the client does not have yet."""
        first, start = self.num_shown is None, self.num_shown or 0
        self.num_shown = len(self.arguments)
        return ToolCall(
            index=self.index,
            id=self.id if first else "",
            name=self.name if first else "",
            arguments=self.arguments[start:],
        )


class CallReader:
    """Assembles calls of pieces: by their ids, else by their index, else one after another.

    `functions` are the names on offer: a name that is one of them does not go on.
    """

    def __init__(self, functions: Collection[str]) -> None:
        self._functions = functions
        self._calls: list[_Call] = []

    def __bool__(self) -> bool:
        return bool(self._calls)

    def add(self, delta: Mapping[str, Any]) -> None:
        """Add a piece."""
        function = delta.get("function") or {}
        identity, name = _text(delta.get("id")), _text(function.get("name"))
        told = function.get("arguments")
        arguments = json.dumps(told) if isinstance(told, Mapping | list) else _text(told)
        call = self._find(identity, delta.get("index"), name, arguments)
        call.id = call.id or identity
        if name != call.name:  # some repeat it with every piece
            call.name += name
        call.arguments += arguments

    def shown(self) -> tuple[ToolCall, ...]:
        """Return what may be shown by now: calls whose id and whole name are known."""
        return tuple(
            call.piece()
            for call in self._calls
            if call.id and call.name and len(call.arguments) > (call.num_shown or 0)
        )

    def rest(self, *, truncated: bool) -> tuple[ToolCall, ...]:
        """Return what is left at the end; calls that were given no id or arguments get them."""
        for call in self._calls:
            call.id = call.id or f"call_{uuid.uuid4().hex[:24]}"
            if not truncated:
                call.arguments = call.arguments or "{}"
        return tuple(
            call.piece()
            for call in self._calls
            if call.num_shown is None or len(call.arguments) > call.num_shown
        )

    def _find(self, identity: str, number: object, name: str, arguments: str) -> _Call:
        """Return the call that a piece belongs to, which may be a new one."""
        same = [
            call
            for call in self._calls
            if (call.id == identity if identity else number is None or call.number == number)
        ]
        if identity and not same:  # an id may come after the call's first piece
            same = [call for call in self._calls if call.number == number and not call.id]
        if same and not self._begins(same[-1], number, name, arguments):
            return same[-1]
        if len(self._calls) == _MOST_CALLS:
            raise ValueError(f"more than {_MOST_CALLS} calls")
        call = _Call(index=len(self._calls), number=number)
        self._calls.append(call)
        return call

    def _begins(self, call: _Call, number: object, name: str, arguments: str) -> bool:
        """Return whether a piece that names a function begins another call than `call`."""
        if not name or not call.name:
            return False
        if None not in (call.number, number) and call.number != number:
            return True  # there are servers where all calls have one id
        if name != call.name:
            return call.name in self._functions or bool(call.arguments)
        return bool(arguments.strip()) and read_object(call.arguments) is not None


class EventReader:
    """Turns the events of one answer into chunks.

    Counts tokens as the log-probabilities list them, else one per event; where the server tells its
    usage, the last chunk says so.
    """

    def __init__(
        self,
        *,
        server: str,
        logprobs: bool,
        functions: Collection[str] = (),
        echoed: GenerationRequest | None = None,
    ) -> None:
        """The answer comes after the tokens of the prompt of `echoed`, where one is given."""
        self._server = server
        self._logprobs = logprobs
        self._echoed = echoed
        self._reason: FinishReason | None = None
        self._stop: str | int | None = None
        self._answered = self._done = self._counted = False
        self._usage: dict[str, int] = {}
        self._calls = CallReader(functions)

    @property
    def ended(self) -> bool:
        """Whether the server said that the answer is whole; without a choice there is none."""
        return self._answered and (self._done or self._counted or self._reason is not None)

    def done(self) -> None:
        """Note that the stream's end was announced; some servers say nothing else."""
        self._done = True

    def read(self, event: Mapping[str, Any] | str) -> Chunk | None:
        """Return what an event adds to the answer, if anything; raises `AttemptFailed`."""
        try:
            if isinstance(event, str):
                raise ValueError("no JSON")
            if event.get("error") or event.get("object") == "error":
                raise from_event(self._server, event.get("error") or event)
            told = event.get("choices") or ()
            choices = [one for one in told if one and one.get("index") in (None, 0, "0")]
            self._answered |= bool(choices)
            # The last event of a stream that asks for usage, where nothing else says that it ends.
            self._counted = event.get("choices") == [] and isinstance(event.get("usage"), Mapping)
            # Groq tells the usage beside the event, Moonshot in the choice.
            for place in (event, event.get("x_groq"), *choices):
                self._read_usage(place.get("usage") if isinstance(place, Mapping) else None)
            if choices and self._echoed is not None:
                return self._echo(choices[0], self._echoed)
            return self._chunk(choices[0]) if choices else None
        except UNREADABLE as error:
            raise unreadable(self._server, event, error) from None

    def last(self) -> Chunk:
        """Return the last chunk, when the stream has ended; raises `AttemptFailed`."""
        if not self.ended:
            raise broke_off(self._server, "the answer broke off")
        reason = self._reason or "stop"
        calls = self._calls.rest(truncated=reason == "length")
        return Chunk(
            text="",
            tokens=(),
            finish_reason="tool_calls" if self._calls and reason == "stop" else reason,
            stop=self._stop,
            tool_calls=calls,
            prompt_tokens=self._usage.get("prompt_tokens"),
            output_tokens=self._usage.get("completion_tokens"),
            cached_tokens=self._usage.get("cached_tokens"),
            reasoning_tokens=self._usage.get("reasoning_tokens"),
        )

    def _read_usage(self, usage: object) -> None:
        """Keep what is told of tokens, as far as it can be true."""
        if not isinstance(usage, Mapping):
            return
        told = {
            "prompt_tokens": usage.get("prompt_tokens", usage.get("input_tokens")),
            "completion_tokens": usage.get("completion_tokens", usage.get("output_tokens")),
            "cached_tokens": next(
                (usage[name] for name in _CACHED if usage.get(name) is not None),
                _part(usage, "prompt_tokens_details", "cached_tokens"),
            ),
            "reasoning_tokens": _part(usage, "completion_tokens_details", "reasoning_tokens"),
        }
        for name, value in told.items():
            count = read_count(value)
            self._usage |= {} if count is None else {name: count}

    def _chunk(self, choice: Mapping[str, Any]) -> Chunk | None:
        self._read_reason(choice.get("finish_reason"))
        stop = choice.get("stop_reason")  # vLLM's, and ours
        if isinstance(stop, str | int):
            self._stop = _text(stop) or stop
        # A server that does not stream tells a whole message; some that do repeat it beside.
        delta = choice.get("delta")
        delta = (choice.get("message") or {}) if delta is None else delta
        text, thought = _read_content(delta.get("content"))
        text = text or _text(choice.get("text"))
        told = delta.get("reasoning_content") or delta.get("reasoning")
        reasoning = thought or _read_content(told)[0]
        refusal = _text(delta.get("refusal"))
        older = delta.get("function_call")
        pieces = delta.get("tool_calls") or ([{"function": older}] if older else [])
        for piece in filter(None, [pieces] if isinstance(pieces, Mapping) else pieces):
            self._calls.add(piece)
        tokens = self._tokens(choice.get("logprobs"), text)
        if not tokens and (reasoning or refusal or pieces):
            tokens = (_HIDDEN,)
        calls = self._calls.shown()
        if not (text or tokens or calls):
            return None
        return Chunk(
            text=text, tokens=tokens, reasoning=reasoning, refusal=refusal, tool_calls=calls
        )

    def _echo(self, choice: Mapping[str, Any], request: GenerationRequest) -> Chunk:
        """Return what a whole choice tells of the prompt and of what follows it."""
        self._read_reason(choice.get("finish_reason"))
        told, num_prompt = choice.get("logprobs") or {}, self._usage.get("prompt_tokens", 0)
        tokens = self._tokens(told, "") if told.get("tokens") else ()
        # Of an answer's first token a log-probability is told, of a prompt's none.
        if not 0 < num_prompt <= len(tokens) or tokens[0].logprob is not None:
            raise AttemptFailed(
                RequestError(f"echo: {self._server} tells no log-probabilities of prompts", "echo"),
                retry=False,
                broken=False,
            )
        prompt = tokens[:num_prompt]
        echoed = request.text or b"".join(one.raw for one in prompt).decode(errors="replace")
        text = _text(choice.get("text")).removeprefix(echoed)
        return Chunk(text=text, tokens=tokens[num_prompt:], prompt=prompt)

    def _read_reason(self, told: object) -> None:
        word = str(told or "").lower().replace("-", "_")
        if word in _NO_REASON:
            return
        if word in _BREAKS:
            raise broke_off(self._server, f"the answer broke off: finish reason {told!r}")
        if self._reason in (None, "stop"):  # a "stop" after "length" takes nothing back
            self._reason = _ENDS.get(word, "stop")

    def _tokens(self, logprobs: Mapping[str, Any] | None, text: str) -> tuple[Token, ...]:
        if not self._logprobs:
            return (_unknown(text),) if text else ()
        if not logprobs:
            if text:
                # A property of the server, not a failure that another attempt would mend.
                error = EngineFailed(
                    f"{self._server} returns no log-probabilities; set logprobs: false in the "
                    "engine's options"
                )
                raise AttemptFailed(error, retry=False, broken=False)
            return ()
        if "content" in logprobs:
            return tuple(_chat_token(item) for item in logprobs["content"] or ())
        tops = logprobs.get("top_logprobs") or [None] * len(logprobs["tokens"])
        return tuple(
            _text_token(token, logprob, top or {})
            for token, logprob, top in zip(
                logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True
            )
        )


def read_count(told: object) -> int | None:
    """Return how many tokens a server tells of, as far as it can be true."""
    if not isinstance(told, int | float) or isinstance(told, bool):
        return None
    return int(told) if 0 <= told <= _MOST_TOKENS and told == int(told) else None


def _text(value: object) -> str:
    """Return a text that can be sent on; empty for what is none."""
    if not isinstance(value, str) or value.isascii():
        return value if isinstance(value, str) else ""
    return whole_text(value)


def _part(usage: Mapping[str, Any], details: str, name: str) -> object:
    found = usage.get(details)
    return found.get(name) if isinstance(found, Mapping) else None


def _read_content(content: object) -> tuple[str, str]:
    """Return text and reasoning of a content, which some servers tell in parts."""
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, Sequence) or isinstance(content, str):
        return _text(content), ""
    text, reasoning = "", ""
    for part in content:
        if not isinstance(part, Mapping):
            text += _text(part)
        elif part.get("type") == "thinking":
            told = part.get("thinking")
            reasoning += told if isinstance(told, str) else _read_content(told)[0]
        else:
            text += _text(part.get("text"))
    return text, reasoning


def _unknown(text: str) -> Token:
    return Token(token_id=0, raw=text.encode(errors="replace"), logprob=None)


def _chat_token(item: Mapping[str, Any]) -> Token:
    tops = [(_raw(other), other.get("logprob")) for other in item.get("top_logprobs") or ()]
    return _token(_raw(item), item.get("logprob"), tops)


def _raw(item: Mapping[str, Any]) -> bytes:
    listed = item.get("bytes")
    if isinstance(listed, list):  # of a number, `bytes` makes as many zeros
        return bytes(listed)
    return str(item["token"]).encode(errors="replace")


def _text_token(label: str, logprob: object, top: Mapping[str, object]) -> Token:
    return _token(_raw_of(label), logprob, [(_raw_of(other), top[other]) for other in top])


def _token(raw: bytes, logprob: object, tops: Sequence[tuple[bytes, object]]) -> Token:
    """Return a token with the alternatives that have a log-probability, likeliest first."""
    known = [(other, value) for other, told in tops if (value := _logprob(told)) is not None]
    ranked = sorted(known, key=lambda entry: -entry[1])
    return Token(
        token_id=0,
        raw=raw,
        logprob=_logprob(logprob),
        top=tuple(TopLogprob(token_id=0, raw=other, logprob=value) for other, value in ranked),
    )


def _logprob(told: Any) -> float | None:  # noqa: ANN401 - whatever JSON can hold
    """Return a log-probability that JSON can tell: minus infinity has none, and NaN is none."""
    value = math.nan if told is None else float(told)
    return None if math.isnan(value) else max(value, _LEAST_LOGPROB)


def _raw_of(label: str) -> bytes:
    """Return what a token's label stands for: text, or the bytes of a part of a character."""
    if _BYTES.fullmatch(label):
        return bytes.fromhex(label.removeprefix("bytes:").replace("\\x", ""))
    return label.encode(errors="replace")
