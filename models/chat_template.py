"""Chat templates: the Jinja text by which a checkpoint turns a conversation into its prompt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.errors import PoolError, RequestError

Message: TypeAlias = Mapping[str, Any]
"""One turn of a conversation: `role` and `content`, both text. An assistant's turn that calls tools
has `tool_calls`, a tool's turn the `tool_call_id` that it answers, as OpenAI writes them.
"""


class ChatTemplate:
    """Renders conversations as Hugging Face does: sandboxed, with the model's special tokens."""

    def __init__(self, source: str, *, special_tokens: Mapping[str, str]) -> None:
        """Compile `source`; raises jinja2's `TemplateSyntaxError`."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template = environment.from_string(source)
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        generation_prompt: bool = True,
    ) -> str:
        """Return the prompt that asks for the assistant's next turn, or the bare conversation.

        The assistant may call `tools`, where the template knows how to say so.

        Raises `RequestError` where the template refuses the conversation.
        """
        try:
            return self._template.render(
                messages=[_turn(message) for message in messages],
                add_generation_prompt=generation_prompt,
                tools=[dict(tool) for tool in tools] or None,
                documents=None,
                **self._special_tokens,
            )
        except TemplateError as error:
            raise RequestError(
                f"messages: the chat template refuses them: {error}", "messages"
            ) from None


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """Return the template of a checkpoint folder, None if it has none.

    It is in chat_template.jinja, or in tokenizer_config.json, alone or as the one called
    "default". Raises `PoolError` that names the file.
    """
    config = _read(folder / "tokenizer_config.json")
    file = folder / "chat_template.jinja"
    source = file.read_text() if file.is_file() else config.get("chat_template")
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source}
        source = named.get("default")
    if source is None:
        return None
    special = {**_read(folder / "special_tokens_map.json"), **config}
    tokens = {
        name: text
        for name, value in special.items()
        if name.endswith("_token")
        and isinstance(text := value.get("content") if isinstance(value, dict) else value, str)
    }
    try:
        return ChatTemplate(str(source), special_tokens=tokens)
    except TemplateSyntaxError as error:
        raise PoolError(f"{folder}: the chat template cannot be read: {error}") from None


def _turn(message: Message) -> dict[str, Any]:
    """Return `message` as templates want it: the arguments of calls as objects, not as text."""
    turn = dict(message)
    if "tool_calls" in turn:
        turn["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _arguments(call["function"])}}
            for call in turn["tool_calls"]
        ]
    return turn


def _arguments(function: Mapping[str, Any]) -> object:
    try:
        return json.loads(function["arguments"])
    except ValueError:
        return function["arguments"]


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        data = json.loads(file.read_text())
    except ValueError as error:
        raise PoolError(f"{file} is not valid JSON: {error}") from None
    return data if isinstance(data, dict) else {}


def _to_json(value: object, indent: int | None = None) -> str:
    """Jinja's own filter escapes HTML, which prompts must not."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise TemplateError(message)
