"""Chat templates: the Jinja text by which a checkpoint turns a conversation into its prompt.

They are rendered as transformers does (its `utils/chat_template_utils.py`), without importing it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

from jinja2 import nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.errors import PoolError, RequestError
from models.sources.gguf import GgufFile, read_gguf
from models.sources.safetensors import TEMPLATES, read_json
from policies.json_text import read_json_text

Message: TypeAlias = Mapping[str, Any]
"""One turn of a conversation: `role` and `content`, both text. An assistant's turn that calls tools
has `tool_calls`, a tool's turn the `tool_call_id` that it answers, as OpenAI writes them.
"""

_SYSTEM_ROLES = ("system", "developer")
_ID_CHARACTERS = 9
_ADDED = (
    *("added_tokens_decoder", "added_tokens"),
    *("extra_special_tokens", "additional_special_tokens", "split_special_tokens"),
)
_DEFAULT = "default"  # transformers' name of the template that stands alone
_OPEN_END = "CONTINUE_FINAL_MESSAGE_TAG "  # transformers' mark; its blank tells whether trimmed


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """How a conversation becomes a prompt.

    With `generation_prompt` the head of the assistant's next turn ends it; with `continue_final`
    the last turn is left open instead, for the model to go on with it. `arguments` are variables
    that the client hands to the template (vLLM's `chat_template_kwargs`).
    """

    generation_prompt: bool = True
    continue_final: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)


_USUAL = Rendering()


@dataclass(frozen=True, kw_only=True)
class PromptFacts:
    """What a checkpoint says of prompts: templates by name, and named special tokens' texts.

    `added_tokens` is what changes its tokenizer.json, as tokenizer_config.json has it.
    """

    templates: Mapping[str, str]
    special_tokens: Mapping[str, str]
    added_tokens: Mapping[str, Any] = field(default_factory=dict)


class ChatTemplate:
    """Renders conversations as Hugging Face does: sandboxed, with the model's special tokens."""

    def __init__(
        self, source: str, *, special_tokens: Mapping[str, str], tool_use: str | None = None
    ) -> None:
        """Compile `source`, and `tool_use` if there is another for requests that offer tools.

        Raises jinja2's `TemplateSyntaxError`.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._template = environment.from_string(source)
        self._tool_use = environment.from_string(tool_use) if tool_use else self._template
        self._special_tokens = dict(special_tokens)
        self._short_ids = "[TOOL_CALLS]" in source

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        rendering: Rendering = _USUAL,
    ) -> str:
        """Return the prompt that asks for the assistant's next turn, unless `rendering` differs.

        The assistant may call `tools`, where the template knows how to say so.

        Raises `RequestError` where the template refuses the conversation or fails on it.
        """
        template = self._tool_use if tools else self._template
        turns = [_turn(message, short_ids=self._short_ids) for message in messages]
        if rendering.continue_final:
            turns[-1]["content"] += _OPEN_END
        variables = {
            "documents": None,
            **self._special_tokens,
            **rendering.arguments,
            "messages": turns,
            "add_generation_prompt": rendering.generation_prompt and not rendering.continue_final,
            "tools": [dict(tool) for tool in tools] or None,
        }
        try:
            text = template.render(variables)
        except TemplateError as error:
            raise RequestError(
                f"messages: the chat template refuses them: {error}", "messages"
            ) from None
        except Exception as error:  # a template is a program of somebody else's
            raise RequestError(
                f"messages: the chat template fails on them: {type(error).__name__}: {error}",
                "messages",
            ) from None
        return _left_open(text, messages[-1]["content"]) if rendering.continue_final else text


def open_conversation(messages: Sequence[Message], system: str | None) -> Sequence[Message]:
    """Return `messages`, after `system` where they have no message of that kind themselves."""
    if system is None or any(message["role"] in _SYSTEM_ROLES for message in messages):
        return messages
    return ({"role": "system", "content": system}, *messages)


def read_chat_template(path: Path) -> ChatTemplate | None:
    """Return the template of a checkpoint (a folder or a .gguf file), None if it has none.

    Raises `PoolError` that names the file.
    """
    facts = read_prompt_facts(path)
    if not facts.templates:
        return None
    if _DEFAULT not in facts.templates:
        raise PoolError(
            f"{path}: of its chat templates {', '.join(sorted(facts.templates))} none is called "
            f"{_DEFAULT!r}"
        )
    try:
        return ChatTemplate(
            facts.templates[_DEFAULT],
            special_tokens=facts.special_tokens,
            tool_use=facts.templates.get("tool_use"),
        )
    except TemplateSyntaxError as error:
        raise PoolError(f"{path}: the chat template cannot be read: {error}") from None


def read_prompt_facts(path: Path) -> PromptFacts:
    """Read templates and named special tokens of a folder or a .gguf file; raises `PoolError`.

    In a folder the templates are chat_template.jinja and additional_chat_templates/, or in
    tokenizer_config.json, alone or by name.
    """
    if path.suffix == ".gguf":
        return prompt_facts_of(read_gguf(path))
    config = read_tokenizer_config(path)
    templates = _read_templates(path / "tokenizer_config.json", config.get("chat_template"))
    files = [path / "chat_template.jinja", *path.glob(f"{TEMPLATES}/*.jinja")]
    written = {
        _DEFAULT if file == files[0] else file.stem: _read_text(file)
        for file in files
        if file.is_file()
    }
    named = {**config, **_dict(config.get("extra_special_tokens"))}
    tokens = {
        name: text
        for name, value in named.items()
        if (name.endswith("_token") or name in _dict(config.get("extra_special_tokens")))
        and isinstance(text := value.get("content") if isinstance(value, dict) else value, str)
    }
    return PromptFacts(
        templates=written or templates,
        special_tokens=tokens,
        added_tokens={key: config[key] for key in _ADDED if config.get(key)},
    )


def _read_templates(file: Path, source: object) -> dict[str, str]:
    """Return the templates by name: one text, a mapping, or a list of names and templates."""
    named = source
    if source is None or isinstance(source, str):
        named = {} if source is None else {_DEFAULT: source}
    elif isinstance(source, list) and all(isinstance(entry, dict) for entry in source):
        named = {entry.get("name"): entry.get("template") for entry in source}
    if isinstance(named, dict):
        templates = {k: v for k, v in named.items() if isinstance(k, str) and isinstance(v, str)}
        if len(templates) == len(named):
            return templates
    raise PoolError(
        f"{file}: chat_template {str(source)[:60]!r} is not allowed; a text, a mapping of names to "
        "texts, or a list of objects with a name and a template is"
    )


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json; without its own list of added tokens, older files complete it.

    That is transformers' rule for special_tokens_map.json, and for added_tokens.json, which is
    found at the key `added_tokens`: ids by text. Raises `PoolError`.
    """
    config = folder / "tokenizer_config.json"
    facts = read_json(config) if config.is_file() else {}
    if "added_tokens_decoder" not in facts:
        named, added = folder / "special_tokens_map.json", folder / "added_tokens.json"
        facts.update(read_json(named) if named.is_file() else {})
        facts["added_tokens"] = read_json(added) if added.is_file() else {}
    return facts


def prompt_facts_of(file: GgufFile) -> PromptFacts:
    """Return the same of a GGUF file that has been read."""
    key = "tokenizer.chat_template"
    return PromptFacts(
        templates={
            name.removeprefix(key).removeprefix(".") or _DEFAULT: str(source)
            for name, source in file.metadata.items()
            if name == key or name.startswith(f"{key}.")
        },
        special_tokens=file.special_tokens(),
    )


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; rendering ignores it."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """Return the block's body, in a scope of its own as in transformers."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _turn(message: Message, *, short_ids: bool) -> dict[str, Any]:
    """Return `message` as templates want it: the arguments of calls as objects, not as text.

    Thoughts have either of two names there. With `short_ids`, calls have ids that Mistral's
    templates take, whoever made them.
    """
    turn = dict(message)
    if "reasoning_content" in turn:
        turn["reasoning"] = turn["reasoning_content"]
    if "tool_calls" in turn:
        turn["tool_calls"] = [
            {
                **call,
                "id": _short_id(call["id"]) if short_ids else call["id"],
                "function": {**call["function"], "arguments": _arguments(call["function"])},
            }
            for call in turn["tool_calls"]
        ]
    if "tool_call_id" in turn and short_ids:
        turn["tool_call_id"] = _short_id(turn["tool_call_id"])
    return turn


def _short_id(identity: str) -> str:
    """Return the id of a call in nine letters and digits, the same for the same one."""
    if len(identity) == _ID_CHARACTERS and identity.isalnum():
        return identity
    return hashlib.blake2b(identity.encode(), digest_size=5).hexdigest()[:_ID_CHARACTERS]


def _left_open(text: str, content: str) -> str:
    """Return `text` up to the mark at the end of its last turn's `content`."""
    at = text.rfind(_OPEN_END.strip())
    if at < 0 or content.strip() not in text:
        raise RequestError(
            "continue_final_message: the chat template does not show the last message's content",
            "continue_final_message",
        )
    return text[:at] if text.startswith(_OPEN_END, at) else text[:at].rstrip()


def _arguments(function: Mapping[str, Any]) -> object:
    try:
        return read_json_text(function["arguments"])
    except ValueError:
        return function["arguments"]


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PoolError(f"{file} cannot be read: {error}") from None


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which prompts must not."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> None:
    raise TemplateError(message)
