"""Responses that are kept: read again, gone on from, forgotten; by nobody but their key."""

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
import sqlalchemy as sa

from router.access.keys import create_key
from router.config import ResponsesConfig
from router.ledger.database import Database
from router.ledger.schema import RESPONSES
from router.openai_api.stored import Kept, ResponseStore
from tests.router.conftest import Running

KEEPING = {"responses": {"store": "if_asked"}}


@pytest.fixture(name="keeping")
def keeping_server(serve: Callable[..., Running]) -> Iterator[Running]:
    """A server that keeps the responses whose requests say so."""
    yield serve(app=KEEPING)


def test_a_conversation_goes_on(keeping: Running) -> None:
    """The next response sees what was said and answered before; instructions are not carried on."""
    client = keeping.client
    first = client.responses.create(
        model="alpha", input="one", instructions="Be brief.", store=True
    )
    assert first.to_dict()["store"] is True
    second = client.responses.create(
        model="alpha", input="two", previous_response_id=first.id, store=True
    )
    assert (second.output_text, second.previous_response_id) == ("two", first.id)
    alone = client.responses.create(model="alpha", input="two")
    assert second.usage is not None
    assert alone.usage is not None
    assert second.usage.input_tokens == alone.usage.input_tokens + sum(
        len(f"{role}\n{text} ") for role, text in (("user", "one"), ("assistant", "one"))
    )
    client.responses.delete(first.id)
    with client.responses.stream(
        model="alpha", input="three", previous_response_id=second.id, store=True
    ) as stream:
        stream.until_done()
        third = stream.get_final_response()
    items = client.responses.input_items.list(third.id, order="asc").data
    told = [(item.role, item.content[0].text) for item in items]  # type: ignore[union-attr]
    assert told == [
        ("user", "one"),
        ("assistant", "one"),
        ("user", "two"),
        ("assistant", "two"),
        ("user", "three"),
    ]
    newest = client.responses.input_items.list(third.id, limit=2)
    assert [item.id for item in newest.data] == [item.id for item in items[::-1][:2]]
    assert len(list(newest)) == 5


def test_kept_responses_are_read_and_forgotten(keeping: Running) -> None:
    """What is read again is what was told; what was not kept, or is forgotten, is not there."""
    client = keeping.client
    told = client.responses.create(model="alpha", input="hello", store=True)
    assert client.responses.retrieve(told.id).to_dict() == told.to_dict()
    unkept = client.responses.create(model="alpha", input="hello")
    assert unkept.to_dict()["store"] is False
    client.responses.delete(told.id)
    for gone in (told.id, unkept.id):
        for ask in (client.responses.retrieve, client.responses.delete):
            with pytest.raises(openai.NotFoundError):
                ask(gone)
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model="alpha", input="x", previous_response_id=gone)
        assert refused.value.param == "previous_response_id"


def test_what_is_over_cannot_be_cancelled(keeping: Running) -> None:
    """A kept response is whole: 400; one that is not there is 404."""
    responses = keeping.client.responses
    told = responses.create(model="alpha", input="hello", store=True)
    with pytest.raises(openai.BadRequestError, match="background"):
        responses.cancel(told.id)
    with pytest.raises(openai.NotFoundError):
        responses.cancel("resp_none")


def test_what_cannot_be_kept_says_so(keeping: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer whose conversation takes too much room is told, and says that it was not kept."""
    monkeypatch.setattr("router.openai_api.stored._MOST_BYTES", 10)
    whole = keeping.post("/v1/responses", input="hello", store=True).json()
    assert (whole["status"], whole["store"]) == ("completed", False)
    asked = {"model": "alpha", "input": "hello", "store": True}
    with keeping.client.responses.stream(**asked) as stream:
        assert stream.get_final_response().to_dict()["store"] is False
    assert _num_rows(keeping.service.ledger.database) == 0


def test_nobody_reads_anothers(serve: Callable[..., Running]) -> None:
    """Another key, and none, get a 404 for what a key had kept, and cannot go on from it."""
    server = serve(app=KEEPING)
    database = server.service.ledger.database
    mine, other = (create_key(database, name=name)[1] for name in ("mine", "other"))
    kept = server.client.with_options(api_key=mine).responses.create(
        model="alpha", input="secret", store=True
    )
    for key in (other, "none"):
        client = server.client.with_options(api_key=key)
        for ask in (
            client.responses.retrieve,
            client.responses.delete,
            client.responses.input_items.list,
        ):
            with pytest.raises(openai.NotFoundError):
                ask(kept.id)
        with pytest.raises(openai.BadRequestError):
            client.responses.create(model="alpha", input="x", previous_response_id=kept.id)
    assert server.client.with_options(api_key=mine).responses.retrieve(kept.id).id == kept.id


def test_nothing_is_kept_unless_allowed(server: Running) -> None:
    """By default `store: true` is refused by name, and nothing is written."""
    for field, value in (("store", True), ("previous_response_id", "resp_1")):
        refused = server.post("/v1/responses", input="x", **{field: value})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == field
    told = server.post("/v1/responses", input="x").json()
    assert server.http.get(f"/v1/responses/{told['id']}").status_code == 404
    assert _num_rows(server.service.ledger.database) == 0


async def _add(store: ResponseStore, response_id: str) -> bool:
    return await store.add(Kept(response={"id": response_id, "output": []}, items=[]), None)


@pytest.mark.parametrize("limit", [{"keep_days": 1e-9}, {"max_gb": 100e-9}])
def test_they_go_in_time_and_for_room(database: Database, limit: dict[str, Any]) -> None:
    """What is older than `keep_days`, and the oldest of more than `max_gb`, is deleted."""
    import asyncio

    store = ResponseStore(database, ResponsesConfig(store="if_asked", **limit))

    async def fill() -> None:
        for index in range(5):
            assert await _add(store, f"resp_{index}")

    asyncio.run(fill())
    assert store.prune() >= 2
    left = _num_rows(database)
    assert left == (0 if "keep_days" in limit else 3)
    assert store.prune() == 0
    if left:
        assert asyncio.run(store.find("resp_4", None)) is not None
        assert asyncio.run(store.find("resp_0", None)) is None


def _num_rows(database: Database) -> int:
    with database.connect() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(RESPONSES)).scalar_one()
