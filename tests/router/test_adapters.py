"""Adapters that come and go while a server runs, for administrators, on every replica."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from models.pool import load_pool
from policies.errors import PolicyError
from router.catalog.catalog import load_catalog
from router.config import AppArgs
from router.editions import Edition, Editions
from router.ledger.database import Database, open_database
from tests.models.engines.stacked.adapters import save_adapter
from tests.models.engines.stacked.tiny import save_checkpoint
from tests.router.conftest import Running, running, write_pool

ENGINES = [{"name": "e", "kind": "stacked", "device": "cpu", "options": {"num_threads": 1}}]
POLICIES = {
    "auto": {"kind": "fixed", "plan": "base"},
    "both": {"kind": "fixed", "plan": {"answer": {"members": ["base", "law"]}}},
}


@pytest.fixture(name="root", scope="module")
def saved_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and adapters of it in a folder of their own; one is another base's."""
    root = tmp_path_factory.mktemp("adapters")
    base = save_checkpoint(root / "base", initializer_range=0.08)
    other = save_checkpoint(root / "other", hidden_size=32)
    for seed, name in enumerate(("law", "tax", "tax-2")):
        save_adapter(root / "loras" / name, base, seed=seed, r=3 + seed)
    save_adapter(root / "loras" / "foreign", other)
    save_adapter(root / "elsewhere" / "tax", base)
    (root / "loras" / "link").symlink_to(root / "elsewhere" / "tax")
    (root / "loras" / "circle").symlink_to(root / "loras" / "circle")
    return root


def models(root: Path, *adapters: str) -> list[dict[str, Any]]:
    """The pool's models: the base and these adapters."""
    return [
        {"name": "base", "engine": "e", "checkpoint": str(root / "base")},
        *({"name": n, "base": "base", "adapter": str(root / "loras" / n)} for n in adapters),
    ]


@pytest.fixture(name="server", scope="module")
def adapter_server(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of the base and one adapter, whose own machine may load more."""
    with running(
        tmp_path_factory.mktemp("pool"),
        engines=ENGINES,
        models=models(root, "law"),
        policies=POLICIES,
        app={
            "http": {"adapter_roots": [str(root / "loras")]},
            "dashboard": {"access": "loopback"},
        },
    ) as server:
        yield server


def complete(server: Running, model: str, **fields: Any) -> httpx.Response:
    """Ask for a completion of eight tokens."""
    body = {"prompt": "hello world", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    return server.post("/v1/completions", model=model, **body, **fields)


def load(server: Running, name: str, path: Path, **fields: Any) -> httpx.Response:
    """Ask for an adapter to be loaded."""
    body = {"lora_name": name, "lora_path": str(path), **fields}
    return server.http.post("/v1/load_lora_adapter", json=body)


def unload(server: Running, name: str) -> httpx.Response:
    """Ask for an adapter to be taken away."""
    return server.http.post("/v1/unload_lora_adapter", json={"lora_name": name})


def test_it_is_served_like_those_of_the_file(server: Running, root: Path, tmp_path: Path) -> None:
    """Alone and fused it answers as where the pool file has it; listed while it is there, and gone
    afterwards; what loads and unloads is in the audit.
    """
    plan = {"answer": {"members": ["law", "tax", "base"], "weights": [0.2, 0.5, 0.3]}}
    with running(
        tmp_path, engines=ENGINES, models=models(root, "law", "tax"), policies={}
    ) as other:
        alone = complete(other, "tax").json()["choices"]
        fused = complete(other, "base", shoal={"plan": plan}).json()["choices"]
    assert complete(server, "tax").status_code == 404
    answer = load(server, "tax", root / "loras" / "tax")
    assert answer.status_code == 200, answer.text
    assert answer.text == "Success: LoRA adapter 'tax' added successfully."
    assert complete(server, "tax").json()["choices"] == alone
    assert complete(server, "base", shoal={"plan": plan}).json()["choices"] == fused
    listed = {e["id"]: e.get("parent") for e in server.http.get("/v1/models").json()["data"]}
    assert (listed["base"], listed["law"], listed["tax"]) == (None, "base", "base")
    answer = unload(server, "tax")
    assert answer.text == "Success: LoRA adapter 'tax' removed successfully."
    assert complete(server, "tax").status_code == 404
    rows = server.http.get("/v1/admin/audit").json()["data"][:2]
    assert [[one["name"] for one in row["after"]["adapters"]] for row in rows] == [
        ["law"], ["law", "tax"],
    ]  # fmt: skip


def test_another_takes_its_place_in_place(server: Running, root: Path) -> None:
    """The same name with other weights answers by these; without `load_inplace` it is refused."""
    assert load(server, "tax", root / "loras" / "tax").status_code == 200
    before = complete(server, "tax", logprobs=1).json()["choices"]
    taken = load(server, "tax", root / "loras" / "tax-2")
    assert taken.status_code == 400 and "'tax' is taken" in taken.text
    answer = load(server, "tax", root / "loras" / "tax-2", load_inplace=True)
    assert answer.status_code == 200, answer.text
    assert complete(server, "tax", logprobs=1).json()["choices"] != before
    unload(server, "tax")


def test_requests_go_on_meanwhile(server: Running, root: Path) -> None:
    """Sixteen clients ask base and adapter while a third comes and goes: all get the answer that
    each gets alone; streams of the one that goes end whole.
    """
    alone = {name: complete(server, name).json()["choices"] for name in ("base", "law")}
    load(server, "tax", root / "loras" / "tax")
    stream = server.client.completions.create(
        model="tax", prompt="hello", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))

    def ask(number: int) -> bool:
        name = ("base", "law")[number % 2]
        return bool(complete(server, name).json()["choices"] == alone[name])

    with ThreadPoolExecutor(16) as clients:
        right = clients.map(ask, range(64))
        for _ in range(3):
            assert unload(server, "tax").status_code == 200
            assert load(server, "tax", root / "loras" / "tax").status_code == 200
        assert unload(server, "tax").status_code == 200
        assert all(right)
    reasons = [chunk.choices[0].finish_reason for chunk in stream if chunk.choices]
    assert reasons[-1] == "length"


@pytest.mark.parametrize(
    ("name", "path", "status", "told"),
    [
        ("new", "elsewhere/tax", 403, "below those that adapters may be loaded from"),
        ("new", "loras/../elsewhere/tax", 403, "elsewhere/tax' is no folder below"),
        ("new", "loras/link", 403, "is no folder below"),
        ("new", "loras/t\0ax", 400, "is no path: embedded null byte"),
        ("new", "loras/circle", 400, "is no path: Symlink loop"),
        ("new", "loras/" + 300 * "x", 400, "cannot be looked for: File name too long"),
        ("new", "loras/none", 400, "models.new.adapter: there is no folder"),
        ("new", "loras/foreign", 400, "is it another base's adapter?"),
        ("base", "loras/tax", 400, "'base' is taken"),
        ("auto", "loras/tax", 400, "'auto' is taken"),
        ("ne w", "loras/tax", 400, "lora_name"),
    ],
)
def test_what_may_not_be_loaded_changes_nothing(
    server: Running, root: Path, name: str, path: str, status: int, told: str
) -> None:
    """Paths outside of the roots, by whatever way; names that are taken; what is no adapter."""
    edition = server.http.get("/v1/admin/edition").json()
    refused = load(server, name, root / path)
    assert refused.status_code == status, refused.text
    assert told in refused.json()["error"]["message"], refused.text
    assert server.http.get("/v1/admin/edition").json() == edition


def test_unloading_what_is_needed_is_refused(server: Running) -> None:
    """The policy that needs it is named; what is no adapter is not found; fields are known."""
    refused = unload(server, "law")
    assert refused.status_code == 400
    assert "policies.both: the policy names the model 'law'" in refused.json()["error"]["message"]
    for name in ("base", "nobody"):
        assert unload(server, name).status_code == 404
    body = {"lora_name": "x", "lora_path": "/", "colour": "red"}
    assert "colour" in server.http.post("/v1/load_lora_adapter", json=body).text


def test_a_judge_cannot_be_unloaded(serve: Callable[..., Running], root: Path) -> None:
    """What shadows need is as what policies need: refused, and requests are answered as before."""
    server = serve(
        engines=ENGINES,
        models=models(root, "law"),
        policies={},
        app={
            "http": {"adapter_roots": [str(root / "loras")]},
            "dashboard": {"access": "loopback"},
            "shadows": {"grader": {"judge": "law", "share": 1, "usd_per_day": 1}},
        },
    )
    refused = unload(server, "law")
    assert refused.status_code == 400
    assert "shadows.grader.judge: 'law' is unknown" in refused.json()["error"]["message"]
    assert complete(server, "auto").status_code == 200


def test_only_administrators_may(serve: Callable[..., Running], root: Path) -> None:
    """Where keys are needed, others than an admin's are refused, and so is everything where the
    configuration names no roots."""
    server = serve(
        engines=ENGINES, models=models(root), policies={}, app={"auth": {"required": True}}
    )
    assert load(server, "tax", root / "loras" / "tax").status_code == 401
    assert unload(server, "tax").status_code == 401


def test_without_roots_nothing_is_loaded(serve: Callable[..., Running], root: Path) -> None:
    """The setting that would allow it is named."""
    server = serve(
        engines=ENGINES, models=models(root), policies={}, app={"dashboard": {"access": "loopback"}}
    )
    refused = load(server, "tax", root / "loras" / "tax")
    assert refused.status_code == 403 and "http.adapter_roots" in refused.text


def test_every_replica_has_the_same(root: Path, tmp_path: Path) -> None:
    """One loads, another follows, a third that starts later has it; a reload takes the file's
    adapters up and keeps what was loaded beside them."""

    def write(*adapters: str) -> Path:
        return write_pool(tmp_path, engines=ENGINES, models=models(root, *adapters), policies={})

    args = AppArgs(pool=write("law")).started()
    database = open_database(f"sqlite:///{tmp_path}/shoal.db")
    first, second = (_replica(args, database) for _ in range(2))
    spec = load_pool(write("tax")).adapters["tax"]

    async def go() -> Editions:
        await first.change(lambda adapters, _: adapters.update(tax=spec))
        await second.follow()
        third = _replica(args, database)
        write("law", "tax-2")
        await third.reload()
        for replica in (first, second):
            await replica.follow()
        return third

    third = asyncio.run(go())
    for replica in (first, second, third):
        pool = replica.current.catalog.pool
        assert [model.name for model in pool.models] == ["base", "law", "tax-2", "tax"]
        assert set(replica.current.catalog.members.adapters(["base", "tax"])) == {"tax"}
        assert replica.current.loaded == ("tax",)
    database.dispose()


def test_a_replica_starts_without_what_is_gone(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so, goes on with what it can have, and takes the rest up when it comes back."""
    folder = shutil.copytree(root / "loras" / "tax", tmp_path / "tax")
    file = write_pool(tmp_path, engines=ENGINES, models=models(root), policies={})
    args = AppArgs(pool=file).started()
    database = open_database(f"sqlite:///{tmp_path}/shoal.db")
    first = _replica(args, database)
    of_base = first.current.catalog.pool.model("base").spec
    spec = of_base.model_copy(
        update={"name": "tax", "base": "base", "adapter": str(folder), "checkpoint": None}
    )

    async def go() -> Editions:
        await first.change(lambda adapters, _: adapters.update(tax=spec))
        folder.rename(tmp_path / "away")
        later = _replica(args, database)
        assert [model.name for model in later.current.catalog.pool.models] == ["base"]
        assert later.current.number == 1
        await later.follow()
        assert caplog.text.count("cannot be taken up here, 1 goes on: models.tax.adapter") == 1
        (tmp_path / "away").rename(folder)
        await later.follow()
        return later

    later = asyncio.run(go())
    assert [model.name for model in later.current.catalog.pool.models] == ["base", "tax"]
    database.dispose()


def _replica(args: AppArgs, database: Database) -> Editions:
    catalog = load_catalog(load_pool(args.pool))
    return Editions(Edition(number=1, loaded_s=0.0, args=args, catalog=catalog), database)


@pytest.mark.parametrize("names", [["base", "law"], ["law", "tax"]])
def test_vllm_fuses_no_adapters(root: Path, tmp_path: Path, names: list[str]) -> None:
    """The same pool file serves there, but a plan that fuses is refused when it loads."""
    engines = [{"name": "e", "kind": "vllm"}]
    pool = load_pool(
        write_pool(tmp_path, engines=engines, models=models(root, "law", "tax"), policies={})
    )
    load_catalog(pool)
    fused = {"both": {"kind": "fixed", "plan": {"answer": {"members": names}}}}
    with pytest.raises(PolicyError, match=r"policies.both: .* runs one adapter per request"):
        load_catalog(pool, policies=fused)


def test_roots_are_absolute() -> None:
    """A relative one would start wherever the server did."""
    with pytest.raises(ValueError, match=r"'loras' is not allowed; an absolute path is"):
        AppArgs.model_validate(yaml.safe_load("http: {adapter_roots: [loras]}"))
