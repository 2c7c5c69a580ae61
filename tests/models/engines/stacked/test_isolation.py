"""One request's failure is its own: whoever shares a step with it gets the answer it gets alone."""

import asyncio
import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.engines.base import Chunk, Engine, Evidence, GenerationRequest, Structure
from models.engines.registry import SupervisedEngine
from models.engines.stacked import runner as runner_module
from models.engines.stacked.runner import Runner
from models.engines.stacked.scheduler import Scheduler
from models.errors import EngineFailed
from tests.models.engines.stacked.tiny import (
    answer,
    build_engine,
    read,
    request,
    running,
    save_checkpoint,
    token_ids,
)

POISON = 666


@pytest.fixture(scope="module", name="folders")
def random_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three random checkpoints (seeds 0 to 2)."""
    root = tmp_path_factory.mktemp("isolation")
    return [save_checkpoint(root / f"{s}", seed=s, initializer_range=0.08) for s in range(3)]


def healthy(num: int) -> list[GenerationRequest]:
    """Requests with everything that a step keeps between tokens: seeds, evidence, penalties."""
    return [
        dataclasses.replace(
            request(
                range(5 + i, 20 + 2 * i),
                ["m0", "m1", "m2"][: 1 + i % 3],
                temperature=1.0,
                seed=i,
                frequency_penalty=0.3,
                ignore_eos=True,
            ),
            evidence=Evidence(temperature=5.0, update=True) if i % 2 else None,
        )
        for i in range(num)
    ]


async def together(engine: Engine, wanted: list[GenerationRequest]) -> list[Any]:
    """The answers to requests that come at once, or what they raise."""
    return await asyncio.gather(*(read(engine, one) for one in wanted), return_exceptions=True)


def tokens(answers: list[list[Chunk]]) -> list[list[int]]:
    """The tokens of answers."""
    return [token_ids(chunks) for chunks in answers]


@pytest.fixture(name="poisoned")
def poisoned_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a token raises wherever a request with the seed `POISON` takes part."""
    draw = runner_module.draw

    def failing(logp_RV: Any, states: Any) -> Any:
        drawn = draw(logp_RV, states)
        if any(state.options.seed == POISON for state in states):
            raise ArithmeticError("a broken kernel")
        return drawn

    monkeypatch.setattr(runner_module, "draw", failing)


@pytest.mark.usefixtures("poisoned")
def test_a_request_that_breaks_its_steps_fails_alone(folders: list[Path]) -> None:
    """Whoever shares its steps gets the tokens that it gets alone, evidence and seeds included."""
    wanted = healthy(6)
    alone = [answer(build_engine(folders), one)[0] for one in wanted]
    poison = request([9, 9], ["m0", "m1"], seed=POISON, temperature=1.0)

    async def run() -> list[Any]:
        async with running(build_engine(folders)) as engine:
            found = await together(engine, [*wanted[:3], poison, *wanted[3:]])
            engine.check_health()
            assert engine.stats().kv_bytes_used == 0
        return found

    found = asyncio.run(run())
    assert isinstance(found[3], EngineFailed)
    assert "a broken kernel" in str(found.pop(3))
    assert tokens(found) == tokens(alone)


@pytest.mark.usefixtures("poisoned")
def test_many_bad_requests_do_not_end_the_engine(folders: list[Path]) -> None:
    """After seven that failed, one by one, the engine still serves."""

    async def run() -> list[Chunk]:
        async with running(build_engine(folders)) as engine:
            for _ in range(7):
                with pytest.raises(EngineFailed, match="a broken kernel"):
                    await read(engine, request([9, 9], seed=POISON))
            engine.check_health()
            return await read(engine, request([5]))

    assert token_ids(asyncio.run(run()))


def test_a_distribution_that_is_not_finite_fails_its_request_alone(
    folders: list[Path], tmp_path: Path
) -> None:
    """A member whose weights are not numbers fails who asks it, drawn from or fused; not others."""
    broken = save_checkpoint(tmp_path / "broken", seed=7)
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    members = [*folders, broken]
    wanted = healthy(6)
    alone = [answer(build_engine(members), one)[0] for one in wanted]
    bad = [
        request([5, 6], ["m3"], temperature=1.0, seed=1),
        request([5, 6], ["m3"], top_p=0.5, temperature=1.0, seed=1),
        request([5, 6], ["m0", "m3"]),
        request([5, 6], ["m3"], structure=Structure(kind="json", text="{}")),
    ]

    async def run() -> list[Any]:
        async with running(build_engine(members)) as engine:
            return await together(engine, [*bad, *wanted])

    found = asyncio.run(run())
    for error in found[: len(bad)]:
        assert isinstance(error, EngineFailed)
        assert "not finite" in str(error)
    assert tokens(found[len(bad) :]) == tokens(alone)


async def _until_well(engine: Engine) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                return engine.check_health()
            except EngineFailed:
                await asyncio.sleep(0.01)


def test_an_engine_that_failed_is_started_again(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every step fails it says so, and serves again once it can, without anybody's help."""
    step, broken = Runner.step, False

    def failing(self: Runner, parts: Any) -> Any:
        if broken:
            raise ArithmeticError("a broken device")
        return step(self, parts)

    monkeypatch.setattr(Runner, "step", failing)

    async def run() -> None:
        nonlocal broken
        engine = SupervisedEngine(lambda: build_engine(folders), check_s=0.01, first_wait_s=0.01)
        async with running(engine):
            [before] = await together(engine, healthy(1))
            broken = True
            for error in await together(engine, healthy(4)):
                assert isinstance(error, EngineFailed)
            async with asyncio.timeout(60):
                with pytest.raises(EngineFailed, match="a broken device"):
                    while True:
                        engine.check_health()
                        await asyncio.sleep(0.001)
            broken = False
            await _until_well(engine)
            assert tokens(await together(engine, healthy(1))) == tokens([before])
            assert engine.stats().restarts_total >= 1
        with pytest.raises(EngineFailed):
            engine.check_health()

    asyncio.run(run())


def test_nobody_waits_for_a_thread_that_has_died(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody foresaw ends the thread, fails its readers, and the engine is started again."""
    next_step, broken = Scheduler.next_step, True

    def failing(self: Scheduler) -> Any:
        if broken and self.running:
            raise KeyError("a bug")
        return next_step(self)

    monkeypatch.setattr(Scheduler, "next_step", failing)

    async def run() -> None:
        nonlocal broken
        engine = SupervisedEngine(lambda: build_engine(folders), check_s=0.01, first_wait_s=0.01)
        async with running(engine), asyncio.timeout(60):
            for error in await together(engine, healthy(3)):
                assert isinstance(error, EngineFailed)
                assert "a bug" in str(error)
            broken = False
            await asyncio.sleep(0.02)
            await _until_well(engine)
            assert token_ids(await read(engine, request([5])))

    asyncio.run(run())


def test_an_engine_whose_step_hangs_is_started_again(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that does not end fails its readers instead of keeping them, and another thread
    serves; the one that hangs ends once its step does, and changes nothing."""
    step, hangs, released = Runner.step, False, threading.Event()
    held: list[threading.Thread] = []

    def hanging(self: Runner, parts: Any) -> Any:
        if hangs:
            held.append(threading.current_thread())
            released.wait()
        return step(self, parts)

    monkeypatch.setattr(Runner, "step", hanging)

    async def run() -> None:
        nonlocal hangs
        engine = SupervisedEngine(
            lambda: build_engine(folders, step_timeout_s=2.0), check_s=0.01, first_wait_s=0.01
        )
        async with running(engine), asyncio.timeout(60):
            [before] = await together(engine, healthy(1))
            hangs = True
            for error in await together(engine, healthy(3)):
                assert isinstance(error, EngineFailed)
                assert "hangs" in str(error)
            hangs = False
            await _until_well(engine)
            assert tokens(await together(engine, healthy(1))) == tokens([before])
            released.set()
            for thread in held:
                await asyncio.to_thread(thread.join)
            assert tokens(await together(engine, healthy(1))) == tokens([before])

    try:
        asyncio.run(run())
    finally:
        released.set()
