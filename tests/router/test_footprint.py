"""Energy, carbon and ceilings of real requests over HTTP, on tiny real models."""

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import openai
import pytest

from models.engines.base import GenerationRequest
from models.engines.registry import create_engine
from router.energy import LaneMeter, energy_of
from router.engines import EngineWorker, Used
from tests.models.engines.stacked.tiny import save_checkpoint
from tests.router.conftest import running

NAMES = ("one", "two", "three")
TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
FUSED = {"kind": "fixed", "plan": {"answer": {"members": list(NAMES)}}}


def serving(folder: Path, **app: Any) -> Any:
    """Serve three tiny chunks; "auto" fuses them, "thrifty" does so within a budget."""
    models = []
    for seed, name in enumerate(NAMES):
        checkpoint = save_checkpoint(folder / name, seed=seed)
        (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
        models.append({"name": name, "engine": "chunks", "checkpoint": name})
    return running(
        folder,
        app={"carbon": {"zone": "FR", "pue": 1.5, "meter": "off"}, **app},
        engines=[{"name": "chunks", "kind": "stacked", "device": "cpu"}],
        models=models,
        policies={
            "auto": FUSED,
            "thrifty": {
                "kind": "budgeted",
                "policy": FUSED,
                "targets": [{"resource": "gco2e", "amount": 1.0}],
            },
        },
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One server for the module."""
    with serving(tmp_path_factory.mktemp("footprint")) as running_server:
        yield running_server


def ask(server: Any, **fields: Any) -> dict[str, Any]:
    """Ask and return the answer's `shoal` object."""
    shoal: dict[str, Any] = server.chat("hello", max_tokens=8, seed=0, **fields).shoal
    return shoal


def test_an_answer_says_what_it_used_and_how_that_is_known(server: Any) -> None:
    """Energy and both kinds of carbon, in total and by member, with method, grid and idle share."""
    shoal = ask(server, model="auto")
    footprint = shoal["footprint"]
    assert footprint["method"] == "modelled:llmcarbon"
    assert footprint["idle"] == "excluded"
    assert footprint["price"] == "typed"
    assert footprint["grid"].pop("factor") > 1
    assert footprint["grid"] == {"gco2e_per_kwh": 56.0, "source": "table:FR"}
    [known] = footprint["methods"].values()
    assert "LLMCarbon" in known["source"]
    assert known["date"]
    assert footprint["wh_low"] == pytest.approx(known["low"] * footprint["wh"])
    assert footprint["wh_high"] == pytest.approx(known["high"] * footprint["wh"])
    assert footprint["gco2e_low"] < footprint["gco2e"] < footprint["gco2e_high"]
    assert footprint["joules_per_output_token"] == pytest.approx(footprint["wh"] * 3600 / 8)
    assert set(footprint["members"]) == set(NAMES)
    assert all(part["engine"] == "chunks" for part in footprint["members"].values())
    for unit in ("wh", "gco2e", "embodied_gco2e", "flops", "busy_s"):
        parts = [part[unit] for part in footprint["members"].values()]
        assert footprint[unit] == pytest.approx(sum(parts))
        assert footprint[unit] > 0
    assert footprint["gco2e"] == pytest.approx(
        footprint["wh"] * 0.056 + footprint["embodied_gco2e"]
    )
    assert shoal["cost"]["gco2e"] == footprint["gco2e"]


@pytest.mark.parametrize("model", ["auto", "policy/thrifty"])
def test_a_request_with_a_carbon_ceiling_uses_fewer_members(server: Any, model: str) -> None:
    """A ceiling between one and two members' worst case leaves one; without it all answer."""
    free = ask(server, model=model)
    assert len(free["members"]) == 3
    tokens = free["tokens"]["one"]
    each = free["footprint"]["members"]["one"]["gco2e"] / (tokens["prompt"] + tokens["output"])
    worst = each * (tokens["prompt"] + 8)
    capped = ask(server, model=model, extra_body={"shoal": {"max_gco2e": 1.5 * worst}})
    assert len(capped["members"]) == 1
    two = ask(server, model=model, extra_body={"shoal": {"max_gco2e": 2.5 * worst}})
    assert len(two["members"]) == 2


def test_a_ceiling_that_no_plan_meets_is_refused(server: Any) -> None:
    """400 names the ceiling, before anything has run."""
    with pytest.raises(openai.BadRequestError, match="max_gco2e"):
        ask(server, model="auto", extra_body={"shoal": {"max_gco2e": 1e-15}})


def test_a_budgeted_policy_learns_what_its_answers_cost(server: Any) -> None:
    """What the controller holds for spent is the sum of the measured footprints."""
    controller = server.service.catalog.policies["thrifty"].controller
    server.settle()
    before = controller.spent()["gco2e"]
    used = [ask(server, model="policy/thrifty")["cost"]["gco2e"] for _ in range(3)]
    server.wait(lambda: controller.spent()["gco2e"] == pytest.approx(before + sum(used)))


class Kettle:
    """A meter that has used one more watt-hour every time it is read."""

    method = "measured:test"
    wh = 0.0

    def read_wh(self) -> float:
        """Return the counter."""
        self.wh += 1.0
        return self.wh


def test_measured_energy_replaces_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a meter at the engine the answer's energy is the meter's, split over its members."""
    seconds = iter(range(1000))
    monkeypatch.setattr(
        "router.local.LaneMeters.of",
        lambda meters, spec: LaneMeter(Kettle(), clock=lambda: float(next(seconds)), pue=2.0),
    )
    with serving(tmp_path) as server:
        for stream in (False, True):
            if stream:
                shoal = list(server.chat("hi", model="auto", max_tokens=4, stream=True))[-1].shoal
            else:
                shoal = server.chat("hi", model="auto", max_tokens=4).shoal
            footprint = shoal["footprint"]
            assert footprint["method"] == "measured:test"
            # From begin to end one reading: one watt-hour, doubled by the PUE, and one second.
            assert footprint["wh"] == pytest.approx(2.0)
            assert footprint["busy_s"] == pytest.approx(1.0)
            assert footprint["members"]["one"]["wh"] == pytest.approx(2.0 / 3)


def test_an_answer_that_is_cut_off_leaves_no_lane_behind() -> None:
    """Closing a stream early ends its lanes: later energy is idle, and its own is asked for."""

    async def cut_off() -> tuple[float, float, Used]:
        meter = LaneMeter(Kettle(), clock=lambda: 0.0)
        worker = EngineWorker(_fake_engine(), meter)
        await worker.start()
        request = GenerationRequest(request_id="r", prompt_tokens=(1, 2), members=("alpha",))
        stream = worker.stream(request)
        first = await anext(stream)
        assert energy_of(first) is None
        await stream.aclose()
        before = meter.idle_wh
        with contextlib.suppress(StopAsyncIteration):
            await anext(stream)
        after = meter.idle_wh
        used = await worker.settle("r")
        await worker.stop()
        return before, after, used

    before, after, used = asyncio.run(cut_off())
    assert after > before
    assert used.num_tokens == 1
    assert used.energy is not None
    assert (used.energy.wh, used.energy.method) == (1.0, "measured:test")


def _fake_engine() -> Any:
    from models.spec import EngineSpec, Model, ModelSpec

    spec = EngineSpec(name="one", kind="fake", options={"token_latency_s": 0.01})
    model = Model(spec=ModelSpec(name="alpha", engine="one"), card=None)
    return create_engine(spec, [model])
