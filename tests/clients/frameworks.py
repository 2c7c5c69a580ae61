"""Client libraries that others built on those of the APIs' makers; and all of them together."""

import asyncio
from typing import Any

import instructor
import litellm
import openai
from instructor.core import InstructorRetryException
from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.libraries import (
    TOOL,
    Anthropic,
    Library,
    OpenAI,
    OpenAINode,
    Responses,
    Sum,
    Told,
    add,
    apply,
    user,
)

litellm.suppress_debug_info = True


class LiteLLM(Library):
    """litellm as a library."""

    name = "litellm"
    errors = (
        litellm.ContextWindowExceededError,
        litellm.AuthenticationError,
        litellm.RateLimitError,
    )

    def _ask(self, model: str, messages: Any, **fields: Any) -> Any:
        return litellm.completion(
            model=f"openai/{model}",
            messages=messages,
            api_base=f"{self.url}/v1",
            api_key=self.key,
            num_retries=0,
            max_retries=0,
            **fields,
        )

    def chat(self, model: str, question: str) -> Told:
        got = self._ask(model, user(question), temperature=0)
        return Told(
            pieces=[got.choices[0].message.content],
            prompt_tokens=got.usage.prompt_tokens,
            output_tokens=got.usage.completion_tokens,
        )

    def stream(self, model: str, question: str) -> Told:
        chunks = list(
            self._ask(
                model,
                user(question),
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        usage = chunks[-1].usage
        return Told(
            pieces=[c.choices[0].delta.content for c in chunks if c.choices[0].delta.content],
            prompt_tokens=usage.prompt_tokens,
            output_tokens=usage.completion_tokens,
        )

    def call(self, model: str, question: str) -> str:
        messages = user(question)
        chunks = list(self._ask(model, messages, tools=[TOOL], stream=True))
        message = litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message
        [call] = message.tool_calls
        result = {
            "role": "tool",
            "tool_call_id": call.id,
            "content": apply(call.function.arguments),
        }
        told = self._ask(model, [*messages, message.model_dump(), result], tools=[TOOL])
        return str(told.choices[0].message.content)

    def parse(self, model: str, question: str) -> Sum:
        got = self._ask(model, user(question), response_format=Sum, temperature=0)
        return Sum.model_validate_json(got.choices[0].message.content)


class LangChain(Library):
    """langchain-openai."""

    name = "langchain-openai"

    def _model(self, model: str) -> ChatOpenAI:
        return ChatOpenAI(
            model=model,
            base_url=f"{self.url}/v1",
            api_key=self.key,  # type: ignore[arg-type]
            temperature=0,
            max_retries=0,
            stream_usage=True,
        )

    def chat(self, model: str, question: str) -> Told:
        got = self._model(model).invoke(question)
        return self._told([str(got.content)], got)

    def stream(self, model: str, question: str) -> Told:
        chunks = list(self._model(model).stream(question))
        return self._told([str(c.content) for c in chunks if c.content], self._joined(chunks))

    def call(self, model: str, question: str) -> str:
        able = self._model(model).bind_tools([TOOL])
        asked = HumanMessage(question)
        message = self._joined(list(able.stream([asked])))
        [call] = message.tool_calls
        result = ToolMessage(apply(call["args"]), tool_call_id=call["id"])
        return str(able.invoke([asked, message, result]).content)

    def parse(self, model: str, question: str) -> Sum:
        got = self._model(model).with_structured_output(Sum, method="json_schema").invoke(question)
        assert isinstance(got, Sum)
        return got

    @staticmethod
    def _joined(chunks: list[Any]) -> AIMessageChunk:
        whole = chunks[0]
        for chunk in chunks[1:]:
            whole += chunk
        assert isinstance(whole, AIMessageChunk)
        return whole

    @staticmethod
    def _told(pieces: list[str], message: Any) -> Told:
        usage = message.usage_metadata
        return Told(
            pieces=pieces,
            prompt_tokens=usage["input_tokens"],
            output_tokens=usage["output_tokens"],
        )


class LlamaIndex(Library):
    """llama-index's OpenAILike."""

    name = "llama-index (`OpenAILike`)"

    def _model(self, model: str, *, calls: bool = False) -> OpenAILike:
        return OpenAILike(
            model=model,
            api_base=f"{self.url}/v1",
            api_key=self.key,
            is_chat_model=True,
            is_function_calling_model=calls,
            temperature=0,
            max_retries=0,
            should_use_structured_outputs=True,
            additional_kwargs={"stream_options": {"include_usage": True}},
        )

    def chat(self, model: str, question: str) -> Told:
        got = self._model(model).chat([ChatMessage(question)])
        return self._told([got.message.content or ""], got.raw)

    def stream(self, model: str, question: str) -> Told:
        got = list(self._model(model).stream_chat([ChatMessage(question)]))
        return self._told([one.delta for one in got if one.delta], got[-1].raw)

    def call(self, model: str, question: str) -> str:
        llm = self._model(model, calls=True)
        tool = FunctionTool.from_defaults(add)
        asked = ChatMessage(question)
        *_, first = llm.stream_chat_with_tools([tool], chat_history=[asked])
        [call] = llm.get_tool_calls_from_response(first)
        result = ChatMessage(
            role="tool",
            content=apply(call.tool_kwargs),
            additional_kwargs={"tool_call_id": call.tool_id},
        )
        told = llm.chat_with_tools([tool], chat_history=[asked, first.message, result])
        return told.message.content or ""

    def parse(self, model: str, question: str) -> Sum:
        got = self._model(model).structured_predict(Sum, PromptTemplate(question))
        assert isinstance(got, Sum)
        return got

    @staticmethod
    def _told(pieces: list[str], raw: Any) -> Told:
        return Told(
            pieces=pieces,
            prompt_tokens=raw.usage.prompt_tokens,
            output_tokens=raw.usage.completion_tokens,
        )


class Instructor(OpenAI):
    """instructor over openai: it exists for structured output, by schema or by a tool."""

    name = "instructor"
    lacks = frozenset({"streaming", "tools", "usage"})
    errors = (InstructorRetryException, InstructorRetryException, InstructorRetryException)

    def parse(self, model: str, question: str) -> Sum:
        mode = instructor.Mode.TOOLS if model == "caller" else instructor.Mode.JSON_SCHEMA
        client = instructor.from_openai(self._client(), mode=mode)
        got = client.chat.completions.create(
            model=model, messages=user(question), response_model=Sum, max_retries=0
        )
        assert isinstance(got, Sum)
        return got


class PydanticAI(Library):
    """pydantic-ai, which runs tools itself."""

    name = "pydantic-ai"
    errors = (ModelHTTPError, ModelHTTPError, ModelHTTPError)

    def _agent(self, model: str, **more: Any) -> Agent[None, Any]:
        provider = OpenAIProvider(
            openai_client=openai.AsyncOpenAI(
                base_url=f"{self.url}/v1", api_key=self.key, max_retries=0
            )
        )
        return Agent(
            OpenAIChatModel(model, provider=provider), model_settings={"temperature": 0}, **more
        )

    def chat(self, model: str, question: str) -> Told:
        got = asyncio.run(self._agent(model).run(question))
        return self._told([got.output], got.usage)

    def stream(self, model: str, question: str) -> Told:

        async def run() -> Told:
            async with self._agent(model).run_stream(question) as got:
                pieces = [piece async for piece in got.stream_text(delta=True, debounce_by=None)]
                return self._told(pieces, got.usage)

        return asyncio.run(run())

    def call(self, model: str, question: str) -> str:

        async def run() -> str:
            async with self._agent(model, tools=[add]).run_stream(question) as got:
                return str(await got.get_output())

        return asyncio.run(run())

    def parse(self, model: str, question: str) -> Sum:
        got = asyncio.run(self._agent(model, output_type=NativeOutput(Sum)).run(question))
        assert isinstance(got.output, Sum)
        return got.output

    @staticmethod
    def _told(pieces: list[str], usage: Any) -> Told:
        return Told(
            pieces=pieces,
            prompt_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
        )


class AiSdk(OpenAINode):
    """Vercel's AI SDK, which runs tools itself."""

    name = "AI SDK"
    module = "ai-sdk"


LIBRARIES: tuple[type[Library], ...] = (
    OpenAI,
    Responses,
    Anthropic,
    LiteLLM,
    LangChain,
    LlamaIndex,
    Instructor,
    PydanticAI,
    OpenAINode,
    AiSdk,
)
