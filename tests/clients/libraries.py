"""Client libraries, each asked in its own way and brought to one form: those of the APIs' makers.

A `Library` asks one question in all ways that its users would; what it lacks is in `lacks`.
"""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import anthropic
import openai
from pydantic import BaseModel, Field

NODE = Path(__file__).parent / "node"
Feature = Literal["streaming", "tools", "structured output", "usage"]
FUNCTION: dict[str, Any] = {
    "name": "add",
    "description": "Add two numbers.",
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
        "additionalProperties": False,
    },
    "strict": True,
}
TOOL: Any = {"type": "function", "function": FUNCTION}
# anthropic 2 has no parameter for it.
GREEDY: Any = {"extra_body": {"temperature": 0}}


class Sum(BaseModel):
    """A sum, bounded: a model that knows no JSON may never end a number."""

    total: int = Field(ge=0, le=999)


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a library tells of an answer: its text in the pieces in which it came, and its usage."""

    pieces: list[str]
    prompt_tokens: int | None = None
    output_tokens: int | None = None

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces)


@dataclass(frozen=True, kw_only=True)
class Library:
    """One library before one server; `errors` are its exceptions for what a server refuses."""

    name: ClassVar[str]
    lacks: ClassVar[frozenset[Feature]] = frozenset()
    # Of a prompt longer than the context, a key that is none, and a budget that is spent.
    errors: ClassVar[tuple[type[Exception], type[Exception], type[Exception]]] = (
        openai.BadRequestError,
        openai.AuthenticationError,
        openai.RateLimitError,
    )

    url: str
    key: str

    def chat(self, model: str, question: str) -> Told:
        """Ask for a whole answer, at temperature 0."""
        raise NotImplementedError

    def stream(self, model: str, question: str) -> Told:
        """Ask for the same as a stream."""
        raise NotImplementedError

    def call(self, model: str, question: str) -> str:
        """Offer `add`, do what the model asks for, and return what it says to the result."""
        raise NotImplementedError

    def parse(self, model: str, question: str) -> Sum:
        """Ask for a `Sum`."""
        raise NotImplementedError


def user(text: str) -> Any:
    """Return a conversation of one message."""
    return [{"role": "user", "content": text}]


def apply(arguments: str | dict[str, Any]) -> str:
    """Return what `add` gives to a call."""
    return str(add(**(json.loads(arguments) if isinstance(arguments, str) else arguments)))


class OpenAI(Library):
    """openai, chat completions."""

    name = "openai"

    def _client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0)

    def chat(self, model: str, question: str) -> Told:
        got = self._client().chat.completions.create(
            model=model, messages=user(question), temperature=0
        )
        assert got.usage is not None
        return Told(
            pieces=[got.choices[0].message.content or ""],
            prompt_tokens=got.usage.prompt_tokens,
            output_tokens=got.usage.completion_tokens,
        )

    def stream(self, model: str, question: str) -> Told:
        *chunks, last = self._client().chat.completions.create(
            model=model,
            messages=user(question),
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        assert last.usage is not None
        return Told(
            pieces=[c.choices[0].delta.content for c in chunks if c.choices[0].delta.content],
            prompt_tokens=last.usage.prompt_tokens,
            output_tokens=last.usage.completion_tokens,
        )

    def call(self, model: str, question: str) -> str:
        messages = user(question)
        with self._client().chat.completions.stream(
            model=model, messages=messages, tools=[TOOL]
        ) as stream:
            message = stream.get_final_completion().choices[0].message
        [call] = message.tool_calls or ()
        result = {
            "role": "tool",
            "tool_call_id": call.id,
            "content": apply(call.function.arguments),
        }
        told = self._client().chat.completions.create(
            model=model,
            messages=[*messages, message.to_dict(), result],  # type: ignore[list-item]
            tools=[TOOL],
        )
        return told.choices[0].message.content or ""

    def parse(self, model: str, question: str) -> Sum:
        got = self._client().chat.completions.parse(
            model=model, messages=user(question), response_format=Sum, temperature=0
        )
        assert got.choices[0].message.parsed is not None
        return got.choices[0].message.parsed


class Responses(OpenAI):
    """openai, Responses."""

    name = "openai, `responses`"

    def chat(self, model: str, question: str) -> Told:
        return self._told(
            self._client().responses.create(model=model, input=question, temperature=0)
        )

    def stream(self, model: str, question: str) -> Told:
        events = list(
            self._client().responses.create(model=model, input=question, temperature=0, stream=True)
        )
        pieces = [e.delta for e in events if e.type == "response.output_text.delta"]
        last = events[-1]
        assert last.type == "response.completed"
        whole = self._told(last.response)
        assert "".join(pieces) == whole.text
        return Told(
            pieces=pieces,
            prompt_tokens=whole.prompt_tokens,
            output_tokens=whole.output_tokens,
        )

    def call(self, model: str, question: str) -> str:
        tools: Any = [{"type": "function", **FUNCTION}]
        items: Any = [{"role": "user", "content": question}]
        with self._client().responses.stream(model=model, input=items, tools=tools) as stream:
            first = stream.get_final_response()
        [call] = first.output
        assert call.type == "function_call"
        result = {
            "type": "function_call_output",
            "call_id": call.call_id,
            "output": apply(call.arguments),
        }
        items += [call.to_dict(), result]
        told = self._client().responses.create(model=model, input=items, tools=tools, store=False)
        return str(told.output_text)

    def parse(self, model: str, question: str) -> Sum:
        got = self._client().responses.parse(model=model, input=question, text_format=Sum)
        assert got.output_parsed is not None
        return got.output_parsed

    @staticmethod
    def _told(response: Any) -> Told:
        usage = response.usage
        return Told(
            pieces=[response.output_text],
            prompt_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
        )


class Anthropic(Library):
    """anthropic, Messages."""

    name = "anthropic"
    errors = (
        anthropic.BadRequestError,
        anthropic.AuthenticationError,
        anthropic.RateLimitError,
    )

    def _messages(self) -> Any:
        return anthropic.Anthropic(base_url=self.url, api_key=self.key, max_retries=0).messages

    def chat(self, model: str, question: str) -> Told:
        return self._told(
            self._messages().create(model=model, max_tokens=64, messages=user(question), **GREEDY)
        )

    def stream(self, model: str, question: str) -> Told:
        with self._messages().stream(
            model=model, max_tokens=64, messages=user(question), **GREEDY
        ) as stream:
            pieces = list(stream.text_stream)
            whole = self._told(stream.get_final_message())
        return Told(
            pieces=pieces,
            prompt_tokens=whole.prompt_tokens,
            output_tokens=whole.output_tokens,
        )

    def call(self, model: str, question: str) -> str:
        tools = [{"name": "add", "input_schema": FUNCTION["parameters"]}]
        asked = {"model": model, "max_tokens": 64, "tools": tools}
        messages = user(question)
        with self._messages().stream(messages=messages, **asked) as stream:
            first = stream.get_final_message()
        [call] = first.content
        result = {
            "type": "tool_result",
            "tool_use_id": call.id,
            "content": apply(call.input),
        }
        messages += [
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [result]},
        ]
        told = self._messages().create(messages=messages, **asked)
        return self._told(told).text

    def parse(self, model: str, question: str) -> Sum:
        # It tells the bounds in words alone, and toys know none: greedily, for a number that fits.
        got = self._messages().parse(
            model=model, max_tokens=64, messages=user(question), output_format=Sum, **GREEDY
        )
        assert isinstance(got.parsed_output, Sum)
        return got.parsed_output

    @staticmethod
    def _told(message: Any) -> Told:
        return Told(
            pieces=[block.text for block in message.content if block.type == "text"],
            prompt_tokens=message.usage.input_tokens,
            output_tokens=message.usage.output_tokens,
        )


class Refused(Exception):
    """What a library for Node threw."""

    def __init__(self, *, name: str, message: str, status: int | None = None) -> None:
        super().__init__(f"{name}: {message}")
        self.status_code = status


class OpenAINode(Library):
    """openai for Node; `node/ask.mjs` asks."""

    name = "openai (Node)"
    errors = (Refused, Refused, Refused)
    module: ClassVar[str] = "openai"

    def chat(self, model: str, question: str) -> Told:
        return Told(**self._ask("chat", model, question))

    def stream(self, model: str, question: str) -> Told:
        return Told(**self._ask("stream", model, question))

    def call(self, model: str, question: str) -> str:
        return Told(**self._ask("call", model, question)).text

    def parse(self, model: str, question: str) -> Sum:
        return Sum(**self._ask("parse", model, question))

    def _ask(self, way: str, model: str, question: str) -> dict[str, Any]:
        asked = {"url": self.url, "key": self.key, "model": model, "question": question}
        done = subprocess.run(
            ["node", str(NODE / "ask.mjs"), self.module, way],
            input=json.dumps(asked),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        told: dict[str, Any] = json.loads(done.stdout)
        if "error" in told:
            raise Refused(**told["error"])
        return told
