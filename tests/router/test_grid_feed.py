"""The live grid feed against a real HTTP server of the Electricity Maps API's shape."""

import asyncio
import contextlib
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import pytest

from policies.base import ModelFacts
from policies.carbon.settings import CarbonSettings, LiveModels
from policies.footprint import Rates
from router.background import GridFeed

NOON_S = 1767268800.0  # 2026-01-01T12:00:00Z


class FakeElectricityMaps:
    """Answers /v3/carbon-intensity/latest as Electricity Maps does; `status` can be set."""

    def __init__(self):
        self.status = 200
        self.answer = {
            "zone": "DE",
            "carbonIntensity": 120,
            "datetime": "2026-01-01T12:00:00.000Z",
            "updatedAt": "2026-01-01T12:10:00.000Z",
            "emissionFactorType": "lifecycle",
            "isEstimated": False,
        }
        self.seen = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                url = urlparse(self.path)
                fake.seen.append((url.path, parse_qs(url.query), self.headers.get("auth-token")))
                body = json.dumps(fake.answer).encode()
                self.send_response(fake.status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v3/carbon-intensity/latest"
        self.thread = threading.Thread(target=self.server.serve_forever)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def settings_for(fake, **feed):
    """Return a carbon section whose feed is the fake server."""
    return CarbonSettings.model_validate(
        {"zone": "DE", "feed": {"url": fake.url, "zone": "DE", "timeout_s": 60, **feed}}
    )


async def refreshed(settings, grid, times=1):
    """Refresh a new feed so often; return what the last one said."""
    feed = GridFeed(settings.feed, grid)
    try:
        for _ in range(times):
            ok = await feed.refresh()
    finally:
        await feed._client.aclose()
    return ok


def test_a_reading_is_used_until_it_is_stale(monkeypatch):
    """The zone and token are sent; the reading answers for `max_age_s`, then the table does."""
    monkeypatch.setenv("GRID_TOKEN", "secret")
    with FakeElectricityMaps() as fake:
        settings = settings_for(fake, token_env="GRID_TOKEN", max_age_s=3600)
        grid = settings.grid(Path())
        assert asyncio.run(refreshed(settings, grid))
    assert fake.seen == [("/v3/carbon-intensity/latest", {"zone": ["DE"]}, "secret")]
    assert (grid.at(NOON_S + 60).gco2e_per_kwh, grid.at(NOON_S + 60).source) == (120, "live:DE")
    assert grid.at(NOON_S + 3601).source == "fallback:DE"
    assert grid.at(NOON_S + 3601).gco2e_per_kwh == 380.9


@pytest.mark.parametrize(
    ("status", "answer"),
    [
        (500, {}),
        (401, {"message": "Invalid auth-token"}),
        (200, {"zone": "DE"}),
        (200, {"carbonIntensity": -5, "datetime": "2026-01-01T12:00:00Z"}),
        (200, {"carbonIntensity": None, "datetime": "2026-01-01T12:00:00Z"}),
    ],
)
def test_a_feed_that_fails_leaves_the_fallback_and_one_warning(caplog, status, answer):
    """Errors and answers without a usable value are logged once, not raised."""
    with FakeElectricityMaps() as fake, caplog.at_level(logging.WARNING, "router.background"):
        fake.status, fake.answer = status, answer
        settings = settings_for(fake)
        grid = settings.grid(Path())
        assert not asyncio.run(refreshed(settings, grid, times=3))
    assert grid.at(NOON_S).source == "fallback:DE"
    assert len(caplog.records) == 1


def test_a_feed_that_is_gone_leaves_the_fallback(caplog):
    """A refused connection is no error of ours."""
    with FakeElectricityMaps() as fake:
        settings = settings_for(fake)
    grid = settings.grid(Path())
    with caplog.at_level(logging.WARNING, "router.background"):
        assert not asyncio.run(refreshed(settings, grid))
    assert grid.at(NOON_S).source == "fallback:DE"


def test_the_feed_keeps_refreshing_in_the_background():
    """`run` fetches again and again until it is cancelled."""

    async def watch(fake):
        settings = settings_for(fake, refresh_s=0.02)
        grid = settings.grid(Path())
        task = asyncio.create_task(GridFeed(settings.feed, grid).run())
        try:
            async with asyncio.timeout(60):
                while grid.at(NOON_S).gco2e_per_kwh != 120:  # noqa: ASYNC110 - the grid has no event
                    await asyncio.sleep(0.01)
                fake.answer = {**fake.answer, "carbonIntensity": 90}
                while grid.at(NOON_S).gco2e_per_kwh != 90:  # noqa: ASYNC110 - the grid has no event
                    await asyncio.sleep(0.01)
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    with FakeElectricityMaps() as fake:
        asyncio.run(watch(fake))
        assert len(fake.seen) >= 2


def test_a_missing_token_is_found_at_start(monkeypatch):
    """The environment variable that the settings name must be set."""
    monkeypatch.delenv("GRID_TOKEN", raising=False)
    with FakeElectricityMaps() as fake:
        settings = settings_for(fake, token_env="GRID_TOKEN")
    with pytest.raises(ValueError, match="'GRID_TOKEN' is not set"):
        GridFeed(settings.feed, settings.grid(Path()))


def test_models_are_repriced_when_the_feed_reports():
    """Rates follow the live intensity; between changes the same objects come back."""
    price = Rates(usd_per_input_token=0.0, usd_per_output_token=0.0)
    with FakeElectricityMaps() as fake:
        settings = settings_for(fake)
        grid = settings.grid(Path())
        models = LiveModels(
            {"m": ModelFacts(name="m", parameters=10**9, rates=price)},
            engine_of={"m": "local"},
            settings=settings,
            grid=grid,
            clock=lambda: NOON_S + 60,
        )
        before = models["m"].rates
        assert models["m"].rates is before
        assert before.gco2e_per_wh == pytest.approx(0.3809)
        asyncio.run(refreshed(settings, grid))
    assert models["m"].rates.gco2e_per_wh == pytest.approx(0.12)
    assert models.rates()["m"] is models["m"].rates
    assert (list(models), len(models)) == (["m"], 1)
