"""Tool calls in what a model wrote, by vLLM's parser for how this model writes them."""

from __future__ import annotations

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.tokenizers import TokenizerLike
from vllm.tool_parsers import ToolParserManager

from models.errors import PoolError
from models.tools import ToolCall, Tools


def read_calls(
    parser: str, tokenizer: TokenizerLike, tools: Tools, text: str
) -> tuple[str, tuple[ToolCall, ...]]:
    """Return the text beside the calls in `text`, and the calls; all of the text if there is none.

    Raises `PoolError` for a parser that vLLM does not know.
    """
    functions = [dict(tool) for tool in tools.functions]
    request = ChatCompletionRequest.model_validate({"messages": [], "tools": functions})
    reader = check_parser(parser)(tokenizer, request.tools)
    found = reader.extract_tool_calls(text, request)
    if not found.tools_called:
        return text, ()
    calls = tuple(
        ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
        for call in found.tool_calls
    )
    return found.content or "", calls


def check_parser(name: str) -> type:
    """Return the parser's class; `PoolError` lists the names that vLLM knows."""
    try:
        parser: type = ToolParserManager.get_tool_parser(name)
    except KeyError:
        known = ", ".join(sorted(ToolParserManager.list_registered()))
        raise PoolError(
            f"options.tool_parser: {name!r} is unknown to vLLM; allowed are {known}"
        ) from None
    return parser
