"""`/v1/responses`: answers as items, and the events in which they come."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from models.answer_format import join_calls
from models.engines.base import Chunk
from router.errors import ApiError, bad_request
from router.openai_api.endpoint import Ask, Head, ResponseWriter, Shapes, WireFormat
from router.openai_api.parts import Part, PartReader, parts_of
from router.openai_api.responses_request import (
    ResponseAsk,
    ResponsesFields,
    read_response_fields,
    response_ask,
)
from router.openai_api.shapes import Response, ResponseEvent
from router.openai_api.stored import Kept, ResponseStore

# Why an answer is not whole, as OpenAI says it.
_INCOMPLETE = {"length": "max_output_tokens", "content_filter": "content_filter"}
# What a chat's fields are called in a response.
_FIELDS = {
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}
_PREFIXES = {"reasoning": "rs", "text": "msg", "refusal": "msg", "call": "fc"}
# The type of a content part by kind, and the event that adds to it.
_PARTS = {
    "reasoning": ("reasoning_text", "text", "response.reasoning_text"),
    "text": ("output_text", "text", "response.output_text"),
    "refusal": ("refusal", "refusal", "response.refusal"),
}


class ResponsesEndpoint(WireFormat):
    """Reads and writes responses, and keeps them in `store`."""

    path = "/v1/responses"
    id_prefix = "resp_"
    shapes = Shapes(takes=ResponsesFields, answers=Response, streams=(ResponseEvent,))

    def __init__(self, store: ResponseStore) -> None:
        self._store = store

    def parse(self, body: bytes) -> Ask:
        """Return what `body` asks for; raises `ApiError`."""
        fields = read_response_fields(body, can_store=self._store.keeps_any)
        return response_ask(fields, store=self._store.keeps(fields.store))

    async def recall(self, ask: Ask, key_id: str | None) -> Ask:
        """Return `ask` as it goes on from the response that it names; raises `ApiError`, 400."""
        assert isinstance(ask, ResponseAsk)
        previous_id = ask.fields.previous_response_id
        if previous_id is None:
            return ask
        earlier = await self._store.find(previous_id, key_id)
        if earlier is None:
            raise bad_request(
                f"previous_response_id: there is no response {previous_id[:80]!r} here for you",
                "previous_response_id",
                "previous_response_not_found",
            )
        before = [*earlier.items, *earlier.response["output"]]
        return await asyncio.to_thread(response_ask, ask.fields, store=ask.store, before=before)

    async def writer(self, head: Head, ask: Ask) -> ResponseWriter:
        """Return what writes the answer."""
        assert isinstance(ask, ResponseAsk)
        return ItemWriter(head=head, ask=ask, store=self._store)

    def error(self, error: ApiError) -> dict[str, Any]:
        """Return OpenAI's error body."""
        return error.renamed(_FIELDS).body()


@dataclass(kw_only=True)
class ItemWriter(ResponseWriter):
    """Writes one response; `_pieces` are those of the item that is open, `_items` the whole ones.

    Events are numbered as they are made.
    """

    named_events = True

    head: Head
    ask: ResponseAsk
    store: ResponseStore
    _reader: PartReader = field(default_factory=PartReader)
    _pieces: list[Part] = field(default_factory=list)
    _items: list[dict[str, Any]] = field(default_factory=list)
    _finish_reason: str | None = None
    _num_events: int = 0

    def whole(self, choices: list[Chunk], usage: Mapping[str, Any]) -> dict[str, Any]:
        """Return the whole response."""
        [answer] = choices
        self._finish_reason = answer.finish_reason
        parts = parts_of(answer)
        self._items = [self._item(part, i, self._status) for i, part in enumerate(parts)]
        return self._response(self._status, _usage(usage))

    def start(self) -> list[dict[str, Any]]:
        """Return the events that announce the response."""
        response = self._response("in_progress", None)
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def chunk(self, index: int, chunk: Chunk) -> list[dict[str, Any]]:  # noqa: ARG002 - one choice
        """Return starts, pieces and ends of items."""
        events: list[dict[str, Any]] = []
        for part in self._reader.read(chunk):
            if not self._pieces or part.key != self._pieces[0].key:
                events += self._close("completed")
                self._pieces = [part]
                events += self._open(part)
            else:
                self._pieces.append(part)
            events += self._delta(part)
        if chunk.finish_reason is not None:
            self._finish_reason = chunk.finish_reason
            events += self._close(self._status)
        return events

    def end(self, usage: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the event with the whole response."""
        response = self._response(self._status, _usage(usage))
        return [self._event(f"response.{self._status}", response=response)]

    def failed(self, error: ApiError) -> list[dict[str, Any]]:
        """Return the event with what there is of the response, and the error."""
        told = error.body()["error"]
        response = self._response("failed", None)
        response["error"] = {"code": told["code"], "message": told["message"]}
        return [self._event("response.failed", response=response)]

    async def keep(self, told: dict[str, Any], key_id: str | None) -> bool:
        """Keep the response where it is to be; it says so itself where it could not be."""
        response = told.get("response", told)
        if not self.ask.store:
            return True
        response["store"] = await self.store.add(
            Kept(response=response, items=self.ask.items), key_id
        )
        return bool(response["store"])

    @property
    def _status(self) -> str:
        return "incomplete" if self._finish_reason in _INCOMPLETE else "completed"

    def _response(self, status: str, usage: Mapping[str, Any] | None) -> dict[str, Any]:
        why = _INCOMPLETE.get(self._finish_reason or "")
        return {
            "id": self.head.id,
            "object": "response",
            "created_at": self.head.created_s,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": why} if why else None,
            "model": self.head.model,
            "output": list(self._items),
            "usage": usage,
            **self.ask.echoed,
        }

    def _item(self, part: Part, index: int, status: str) -> dict[str, Any]:
        """Return an output item; `part` is whole, or the empty one that a stream begins with."""
        item: dict[str, Any] = {
            "id": f"{_PREFIXES[part.kind]}_{self.head.id.removeprefix('resp_')}_{index}",
            "status": status,
        }
        if part.call is not None:
            call = {"call_id": part.call.id, "name": part.call.name}
            return {**item, "type": "function_call", **call, "arguments": part.call.arguments}
        content = [_content(part)] if part.text else []
        if part.kind == "reasoning":
            return {**item, "type": "reasoning", "summary": [], "content": content}
        return {**item, "type": "message", "role": "assistant", "content": content}

    def _open(self, part: Part) -> Iterator[dict[str, Any]]:
        index = len(self._items)
        item = self._item(_emptied(part), index, "in_progress")
        yield self._event("response.output_item.added", output_index=index, item=item)
        if part.call is None:
            begun = _content(_emptied(part))
            yield self._event("response.content_part.added", **self._where(part), part=begun)

    def _delta(self, part: Part) -> Iterator[dict[str, Any]]:
        if part.call is None:
            told = {"delta": part.text, **_no_logprobs(part)}
            yield self._event(f"{_PARTS[part.kind][2]}.delta", **self._where(part), **told)
        elif part.call.arguments:
            name = "response.function_call_arguments.delta"
            yield self._event(name, **self._where(part), delta=part.call.arguments)

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        """End the item that is open, if one is."""
        if not self._pieces:
            return
        part, index = _joined(self._pieces), len(self._items)
        item, where = self._item(part, index, status), self._where(part)
        if part.call is not None:
            told = {"name": part.call.name, "arguments": part.call.arguments}
            yield self._event("response.function_call_arguments.done", **where, **told)
        else:
            _, name, kind = _PARTS[part.kind]
            yield self._event(f"{kind}.done", **where, **{name: part.text}, **_no_logprobs(part))
            yield self._event("response.content_part.done", **where, part=_content(part))
        self._items.append(item)
        self._pieces = []
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _where(self, part: Part) -> dict[str, Any]:
        index = len(self._items)
        where: dict[str, Any] = {
            "item_id": self._item(part, index, "")["id"],
            "output_index": index,
        }
        return where if part.call is not None else {**where, "content_index": 0}

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **more}


def _joined(pieces: list[Part]) -> Part:
    """Return the part that `pieces` make."""
    calls = join_calls(piece.call for piece in pieces if piece.call is not None)
    text = "".join(piece.text for piece in pieces)
    return Part(kind=pieces[0].kind, text=text, call=calls[0] if calls else None)


def _emptied(part: Part) -> Part:
    return replace(part, text="", call=part.call and replace(part.call, arguments=""))


def _content(part: Part) -> dict[str, Any]:
    kind, name, _ = _PARTS[part.kind]
    more: dict[str, Any] = {"annotations": []} if part.kind == "text" else {}
    return {"type": kind, name: part.text, **more, **_no_logprobs(part)}


def _no_logprobs(part: Part) -> dict[str, Any]:
    """Return the field that OpenAI's types want of texts."""
    return {"logprobs": []} if part.kind == "text" else {}


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0, **usage.get("prompt_tokens_details", {})},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {
            "reasoning_tokens": 0,
            **usage.get("completion_tokens_details", {}),
        },
        "total_tokens": usage["total_tokens"],
    }
