"""Offline work over files, asked for by OpenAI's own client."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import sqlalchemy as sa

from router.access.keys import create_key, revoke_key
from router.config import AppArgs
from router.ledger.database import Database
from router.ledger.schema import BATCHES
from router.openai_api.batches import BatchFields, BatchStore
from tests.router.conftest import Running, running

CHAT = "/v1/chat/completions"


def line(custom_id: str, text: str = "hello", *, url: str = CHAT, **body: Any) -> dict[str, Any]:
    """Return one line of a batch."""
    if url == CHAT:
        body.setdefault("messages", [{"role": "user", "content": text}])
    body.setdefault("model", "alpha")
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def begin(client: openai.OpenAI, lines: list[Any], *, url: Any = CHAT, **more: Any) -> Any:
    """Upload `lines` and begin a batch over them."""
    data = "\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines)
    file = client.files.create(file=("in.jsonl", data.encode()), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=url, completion_window="24h", **more
    )


def ended(client: openai.OpenAI, batch_id: str) -> Any:
    """Wait until a batch is over and return it; the limit is for what would never end."""
    end = time.monotonic() + 60
    while True:
        batch = client.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "cancelled", "expired"):
            return batch
        assert time.monotonic() < end, batch
        time.sleep(0.1)


def results(client: openai.OpenAI, file_id: str) -> dict[str, Any]:
    """Return a file's lines by what the client calls them."""
    lines = client.files.content(file_id).text.splitlines()
    found = {one["custom_id"]: one for one in map(json.loads, lines)}
    assert len(found) == len(lines), "no line has two results"
    return found


def test_lines_are_answered_and_errors_kept_apart(server: Running) -> None:
    """Each line has one result by its id; what is refused stands in the error file."""
    client = server.client
    lines = [line(f"q{i}", f"text {i}") for i in range(12)]
    lines += [line("bad", temperature=9), line("stream", stream=True)]
    batch = begin(client, lines, metadata={"night": "1"})
    assert (batch.status, batch.output_file_id) == ("validating", None)
    batch = ended(client, batch.id)
    assert (batch.status, batch.metadata) == ("completed", {"night": "1"})
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (14, 12, 2)
    told = results(client, batch.output_file_id)
    for i in range(12):
        body = told[f"q{i}"]["response"]["body"]
        assert body["choices"][0]["message"]["content"] == f"text {i}"
        assert told[f"q{i}"]["response"]["status_code"] == 200
    failed = results(client, batch.error_file_id)
    assert failed["bad"]["response"]["body"]["error"]["param"] == "temperature"
    assert failed["stream"]["response"]["status_code"] == 400
    server.wait(lambda: sum(r.status == 200 for r in server.ledger.records) == 12)
    assert client.files.retrieve(batch.output_file_id).purpose == "batch_output"
    assert batch.id in [one.id for one in client.batches.list()]


@pytest.mark.parametrize(
    ("url", "body"),
    [("/v1/completions", {"prompt": "hi"}), ("/v1/responses", {"input": "hi"})],
)
def test_other_endpoints(server: Running, url: str, body: dict[str, Any]) -> None:
    """Text completions and responses are answered as well."""
    batch = ended(server.client, begin(server.client, [line("a", url=url, **body)], url=url).id)
    answer = results(server.client, batch.output_file_id)["a"]["response"]
    assert (answer["status_code"], batch.error_file_id) == (200, None)


def test_a_file_that_is_no_batch_fails_by_line(server: Running) -> None:
    """Every kind of bad line is named with its number, and nothing is answered."""
    lines = [
        line("a"),
        "{",
        line("a"),
        line("c", url="/v1/completions"),
        {**line("d"), "method": "GET"},
        {**line("e"), "body": None},
        json.dumps(line("f", "x" * (2**22 + 2**15))),
        json.dumps(line("g", stop_token_ids=[1] * 260_000)),
    ]
    batch = ended(server.client, begin(server.client, lines).id)
    assert batch.status == "failed"
    assert [(one.line, one.code) for one in batch.errors.data] == [
        (2, "invalid_json_line"),
        (3, "duplicate_custom_id"),
        (4, "mismatched_url"),
        (5, "invalid_method"),
        (6, "invalid_value"),
        (7, "line_too_long"),
        (8, "body_too_complex"),
    ]
    assert not server.ledger.records


def test_bad_requests_are_named(server: Running) -> None:
    """Files of another purpose, unknown files and endpoints."""
    client = server.client
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=("a.txt", b"x"), purpose="assistants")
    with pytest.raises(openai.NotFoundError) as caught:
        client.batches.create(input_file_id="file-x", endpoint=CHAT, completion_window="24h")
    assert caught.value.param == "input_file_id"
    with pytest.raises(openai.BadRequestError, match="endpoint"):
        begin(client, [line("a")], url="/v1/nothing")
    page = {"origin": "http://evil.example"}
    refused = server.http.post(
        "/v1/files", files={"file": b"x"}, data={"purpose": "batch"}, headers=page
    )
    assert refused.status_code == 415, "no web page uploads to a server without keys"


@pytest.fixture(name="slow")
def slow_server(serve: Callable[..., Running]) -> Iterator[Running]:
    """A server whose answers take a while, and which works on two lines at once."""
    options = {"models": {"alpha": {"token_latency_s": 0.05}}}
    engines = [
        {"name": "one", "kind": "fake", "options": options},
        {"name": "two", "kind": "fake"},
    ]
    yield serve(engines=engines, app={"batches": {"concurrency": 2}})


def test_a_file_is_kept_as_long_as_its_owner_says(server: Running) -> None:
    """`expires_after` counts from the upload; nothing else is allowed."""
    upload: dict[str, Any] = {"file": ("in.jsonl", b"{}"), "purpose": "batch"}

    def kept(anchor: Any, seconds: int) -> openai.types.FileObject:
        after: Any = {"anchor": anchor, "seconds": seconds}
        return server.client.files.create(**upload, expires_after=after)

    file = kept("created_at", 7200)
    assert file.expires_at == pytest.approx(file.created_at + 7200, abs=1)
    for anchor, seconds in (("created_at", 60), ("created_at", 10**9), ("last_active_at", 7200)):
        with pytest.raises(openai.BadRequestError, match="expires_after"):
            kept(anchor, seconds)


def test_cancelling_keeps_what_is_done(slow: Running) -> None:
    """A cancelled batch ends soon, with the results that it had."""
    client = slow.client
    batch = begin(client, [line(f"q{i}", "0123456789") for i in range(200)])
    slow.wait(lambda: client.batches.retrieve(batch.id).request_counts.completed > 0)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = ended(client, batch.id)
    assert batch.status == "cancelled"
    assert len(results(client, batch.output_file_id)) == batch.request_counts.completed < 200


def test_expired_lines_say_so(slow: Running) -> None:
    """Where the window is over, what is not answered stands in the error file."""
    client = slow.client
    batch = begin(client, [line(f"q{i}", "0123456789") for i in range(200)])
    slow.wait(lambda: client.batches.retrieve(batch.id).request_counts.completed > 0)
    with slow.ledger.database.engine.begin() as connection:
        connection.execute(sa.update(BATCHES).values(expires_s=time.time()))
    # Who works on it has read the row already: another takes it up.
    slow.loop.call_soon_threadsafe(_restart, slow)
    batch = ended(client, batch.id)
    assert batch.status == "expired"
    counts = batch.request_counts
    assert counts.completed + counts.failed == 200
    late = results(client, batch.error_file_id)
    assert {one["error"]["code"] for one in late.values()} == {"batch_expired"}


def _restart(server: Running) -> None:
    """Cancel what works on batches, as the end of a process does, and begin anew."""
    import asyncio

    service = server.service
    [task] = [task for task in service._running if task.get_name() == "batching"]
    task.cancel()
    [(worker, one)] = [(w, b) for w, b in service._background.items() if w.name == "batching"]
    service._running.append(asyncio.create_task(worker.run(one.run), name="batching"))


def test_a_restart_loses_and_doubles_nothing(slow: Running) -> None:
    """Cut off twice in its work, a batch has one result for every line."""
    client = slow.client
    batch = begin(client, [line(f"q{i}", f"t{i}") for i in range(30)])
    for num in (2, 10):
        while client.batches.retrieve(batch.id).request_counts.completed < num:
            time.sleep(0.05)
        slow.loop.call_soon_threadsafe(_restart, slow)
        slow.wait(
            lambda: (
                sum(t.get_name() == "batching" and not t.done() for t in slow.service._running) == 1
            )
        )
    batch = ended(client, batch.id)
    told = results(client, batch.output_file_id)
    assert len(told) == batch.request_counts.completed == 30
    for i in range(30):
        assert told[f"q{i}"]["response"]["body"]["choices"][0]["message"]["content"] == f"t{i}"


def test_replicas_share_the_work(slow: Running, tmp_path_factory: Any) -> None:
    """Of two servers on one ledger each takes a batch, and either tells of both."""
    folder = tmp_path_factory.mktemp("second")
    url = {"ledger": {"url": str(slow.ledger.database.engine.url)}}
    with running(folder, app=url) as second:
        batches = [begin(slow.client, [line("a", "x" * 20)] * 1) for _ in range(4)]
        for batch in batches:
            told = ended(second.client, batch.id)
            assert results(second.client, told.output_file_id)["a"]["response"]


def test_keys_are_kept_apart_and_charged(serve: Callable[..., Running]) -> None:
    """Another key sees no files or batches; lines count for their key; a revoked one's fail."""
    server = serve()
    database = server.service.ledger.database
    (mine, secret), (_, other) = (create_key(database, name=name) for name in ("mine", "other"))
    client = server.client.with_options(api_key=secret)
    batch = ended(client, begin(client, [line("a")]).id)
    server.wait(lambda: bool(server.ledger.records))
    assert [record.key_id for record in server.ledger.records] == [mine.id]
    for stranger in (server.client, server.client.with_options(api_key=other)):
        for look in (
            lambda c: c.batches.retrieve(batch.id),
            lambda c: c.batches.cancel(batch.id),
            lambda c: c.files.content(batch.output_file_id),
            lambda c: c.files.delete(batch.input_file_id),
        ):
            with pytest.raises(openai.NotFoundError):
                look(stranger)
        assert list(stranger.batches.list()) == list(stranger.files.list()) == []
    assert client.files.delete(batch.output_file_id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.content(batch.output_file_id)
    late = begin(client, [line("b")])
    revoke_key(database, mine.id)
    with database.connect() as connection:
        wanted = sa.select(BATCHES.c.num_failed).where(BATCHES.c.batch_id == late.id)
        server.wait(lambda: connection.execute(wanted).scalar() == 1 or connection.rollback())


def test_files_are_bounded(serve: Callable[..., Running]) -> None:
    """One file's size and lines have a limit, and all files together."""
    server = serve(app={"batches": {"max_file_mb": 0.1, "max_gb": 1e-4, "max_requests": 3}})
    client = server.client
    with pytest.raises(openai.APIStatusError) as refused:
        client.files.create(file=("a", b"x" * 300_000), purpose="batch")
    assert refused.value.status_code == 413
    batch = ended(client, begin(client, [line(f"{i}") for i in range(4)]).id)
    assert (batch.status, batch.errors.data[0].line) == ("failed", 4)
    for _ in range(2):
        client.files.create(file=("a", b"x" * 60_000), purpose="batch")
    with pytest.raises(openai.APIStatusError, match="max_gb"):
        client.files.create(file=("a", b"x"), purpose="batch")


def test_files_that_come_at_once_share_the_room(serve: Callable[..., Running]) -> None:
    """What is on its way counts: uploads side by side take no more than one after the other."""
    server = serve(app={"batches": {"max_gb": 2e-3}})

    def upload(_: int) -> int:
        with httpx.Client(base_url=server.url, timeout=120) as http:
            file = ("a", b"x" * 1_500_000)
            told = http.post("/v1/files", files={"file": file}, data={"purpose": "batch"})
            return told.status_code

    with ThreadPoolExecutor(8) as clients:
        statuses = list(clients.map(upload, range(8)))
    assert set(statuses) <= {200, 413} and 413 in statuses, statuses
    kept = server.client.files.list()
    assert sum(file.bytes for file in kept) <= 2e6 + 8 * 2**18
    for file in kept:
        server.client.files.delete(file.id)
    assert upload(0) == 200, "what was refused takes no room"


def test_small_files_take_room_too(serve: Callable[..., Running]) -> None:
    """What is kept of a file beside its bytes counts: nobody fills a disk with empty ones."""
    server = serve(app={"batches": {"max_gb": 1e-5}})
    with pytest.raises(openai.APIStatusError, match="max_gb"):
        for _ in range(20):
            server.client.files.create(file=("a", b"x"), purpose="batch")


def test_batches_are_forgotten(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are over go in time, and the oldest of a key that has very many."""
    monkeypatch.setattr("router.openai_api.batches._MOST_KEPT", 3)
    store = BatchStore(database)
    fields = BatchFields(input_file_id="file-x", endpoint=CHAT, completion_window="24h")

    def add(key_id: str) -> str:
        return str(store.add(fields, key_id)["batch_id"])

    begun = [add("mine") for _ in range(6)]
    for batch_id in begun:
        assert store.move(batch_id, "failed")
    theirs, last = add("theirs"), add("mine")
    assert all(store.find(batch_id, "mine") for batch_id in (*begun[3:], last))
    assert not any(store.find(batch_id, "mine") for batch_id in begun[:3])
    assert store.prune(time.time() - 60) == 0
    assert store.prune(time.time() + 1) == 3
    assert store.find(theirs, "theirs") and store.find(last, "mine"), "they are under way"


def test_batches_are_listed_by_pages(serve: Callable[..., Running]) -> None:
    """Newest first, each once, at most a hundred at a time: whole batches are read for no more."""
    server = serve()
    begun = [begin(server.client, [line(f"{i}")]).id for i in range(7)]
    listed = [batch.id for batch in server.client.batches.list(limit=3)]
    assert listed == begun[::-1]
    last = server.client.batches.list(limit=3, after=begun[1])
    assert ([batch.id for batch in last.data], last.has_more) == ([begun[0]], False)
    with pytest.raises(openai.BadRequestError, match="limit"):
        server.client.batches.list(limit=101)


def test_a_batchs_metadata_are_bounded(server: Running) -> None:
    """They are kept, so that they have OpenAI's bounds."""
    for metadata in ({"x" * 65: "y"}, {"x": "y" * 513}, {f"{i}": "y" for i in range(17)}):
        with pytest.raises(openai.BadRequestError, match="metadata"):
            begin(server.client, [line("a")], metadata=metadata)


def test_a_batch_waits_for_the_cheaper_hour(serve: Callable[..., Running], tmp_path: Path) -> None:
    """After its first lines, which show how long one takes; others are answered meanwhile."""
    cheap_s = time.time() + 8
    moments = [(datetime.fromtimestamp(s, UTC).isoformat(), usd)
               for s, usd in ((0, 0.4), (cheap_s, 0.1), (cheap_s + 86_400, 0.4))]  # fmt: skip
    tariff = tmp_path / "tariff.csv"
    tariff.write_text("time,usd_per_kwh\n" + "".join(f"{t},{usd}\n" for t, usd in moments))
    options = {"models": {"alpha": {"token_latency_s": 0.05}}}
    engines = [{"name": "one", "kind": "fake", "options": options}, {"name": "two", "kind": "fake"}]
    batches = {"concurrency": 2, "wait_for": "price", "tariff_file": str(tariff)}
    server = serve(engines=engines, app={"batches": batches})
    batch = begin(server.client, [line(f"q{i}", "0123456789") for i in range(30)])
    server.wait(lambda: len(server.ledger.records) >= 2)
    server.chat("now", model="beta")
    batch = ended(server.client, batch.id)
    assert len(results(server.client, batch.output_file_id)) == 30
    early = [one for one in server.ledger.records if one.time_s < cheap_s]
    assert any(one.model == "beta" for one in early)
    assert len(early) <= 5, "two are answered, two are under way, and one was not the batch's"


@pytest.mark.parametrize("batches", [{"wait_for": "price"}, {"tariff_file": "tariff.csv"}])
def test_waiting_needs_to_know_what_for(batches: dict[str, Any]) -> None:
    """A tariff and the wish to follow it go together; carbon needs hours that are announced."""
    with pytest.raises(ValueError, match="wait_for: price and tariff_file go together"):
        AppArgs.model_validate({"batches": batches})
    with pytest.raises(ValueError, match=r"wait_for: carbon needs carbon\.grid_file"):
        AppArgs.model_validate({"batches": {"wait_for": "carbon"}})
