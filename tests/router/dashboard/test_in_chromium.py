"""The page in a real browser, on a real server under traffic."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from policies.footprint import Cost
from router.access.keys import create_key
from router.ledger.database import open_database
from router.record import MemberTokens
from tests.router.conftest import Running, running
from tests.router.dashboard.browser import chromium
from tests.router.ledger.records import record

pytestmark = pytest.mark.timeout(600)

HOSTILE = "<img src=x onerror=\"document.title='taken over'\">"
EXPERIMENT = {
    "unit": "request",
    "arms": {"old": {"policy": "auto", "weight": 0.5}, "new": {"policy": "dear", "weight": 0.5}},
    "secondary": ["usd"],
    "guardrails": [{"metric": "error_rate", "limit": 0.02}],
    "segments": ["length"],
}


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """One browser for all tests of this file."""
    with chromium() as started:
        yield started


@contextmanager
def _serving(folder: Path, **config: Any) -> Iterator[Running]:
    policies = {
        "auto": {"kind": "fixed", "plan": "beta"},
        "dear": {"kind": "fixed", "plan": "alpha"},
        "both": {"kind": "fixed", "plan": {"answer": {"members": ["alpha", "beta"]}}},
    }
    ledger = {"url": f"sqlite:///{folder / 'shoal.db'}", "flush_interval_s": 0.02}
    app = {"ledger": ledger, "budgets": {"server": {"usd_per_day": 1}}, **config}
    with running(folder, app=app, policies=policies) as server:
        yield server


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server on loopback that has answered, failed and been rated, with an experiment."""
    folder = tmp_path_factory.mktemp("busy")
    config = {"dashboard": {"access": "loopback"}, "experiments": {"old-or-new": EXPERIMENT}}
    with _serving(folder, **config) as server:
        for number in range(24):
            model = ("auto", "policy/both", "alpha")[number % 3]
            answer = server.post(model=model).json()
            server.http.post("/v1/feedback", json={"id": answer["id"], "score": number % 2})
        assert server.post(model=HOSTILE).status_code == 404
        yield server


def _open(browser: webdriver.Chrome, server: Running, path: str = "/dashboard") -> None:
    browser.get(server.url + path)


def _wait(browser: webdriver.Chrome, condition: Callable[[], Any]) -> None:
    WebDriverWait(browser, 120, poll_frequency=0.1).until(lambda _: condition())


def _text(browser: webdriver.Chrome, selector: str) -> str:
    # In one step: the page may replace an element between finding and reading it.
    script = "return document.querySelector(arguments[0])?.innerText ?? '';"
    return str(browser.execute_script(script, selector))


def _tile(browser: webdriver.Chrome, name: str) -> str:
    script = """
        const tiles = [...document.querySelectorAll(".tile")];
        const tile = tiles.find((one) => one.querySelector("h2").textContent === arguments[0]);
        return tile ? tile.querySelector("strong").textContent : "";
    """
    return str(browser.execute_script(script, name))


def _errors(browser: webdriver.Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_it_shows_what_the_ledger_holds(browser: webdriver.Chrome, busy: Running) -> None:
    """Totals, four drawn charts, mix, quality, budgets and experiments, without one error."""
    _open(browser, busy)
    _wait(browser, lambda: _tile(browser, "Requests") == "25")
    assert _tile(browser, "Not answered") == "4%"
    assert _tile(browser, "Spent").startswith("$0.0")
    for chart in ("spend", "carbon", "requests", "latency"):
        drawn = browser.execute_script(
            "const c = document.querySelector(arguments[0]);"
            "const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
            "return d.some((value) => value > 0);",
            f"#{chart} canvas",
        )
        assert drawn, f"the chart {chart} is blank"
    mix = _text(browser, "#mix")
    assert "both policy" in mix
    assert "alpha model" in mix
    assert "alpha + beta" in mix
    _wait(browser, lambda: "old-or-new" in _text(browser, "#experiments"))
    points = browser.find_elements(By.CSS_SELECTOR, "#quality circle")
    assert len(points) == len(browser.find_elements(By.CSS_SELECTOR, "#quality tbody tr")) >= 3
    assert "usd per day" in _text(browser, "#budgets")
    assert not _errors(browser)


def _cells(browser: webdriver.Chrome, table: str) -> list[list[str]]:
    """The text of a table's body, row by row."""
    script = "return [...document.querySelectorAll(arguments[0] + ' tbody tr')]"
    script += ".map((row) => [...row.children].map((cell) => cell.textContent));"
    return list(browser.execute_script(script, table))


def test_it_works_offline(browser: webdriver.Chrome, busy: Running) -> None:
    """Everything that the page loads comes from the server itself."""
    _open(browser, busy)
    _wait(browser, lambda: _tile(browser, "Requests"))
    script = "return performance.getEntriesByType('resource').map((entry) => entry.name);"
    loaded = browser.execute_script(script)
    assert len(loaded) > 5
    assert all(url.startswith(busy.url + "/") for url in loaded)


def test_it_is_live(browser: webdriver.Chrome, busy: Running) -> None:
    """A request shows up within seconds, without a reload; other periods are a click away."""
    _open(browser, busy)
    _wait(browser, lambda: _tile(browser, "Requests"))
    before = int(_tile(browser, "Requests"))
    busy.post(model="beta")
    _wait(browser, lambda: int(_tile(browser, "Requests")) == before + 1)
    browser.find_element(By.CSS_SELECTOR, "#windows button[value='24h']").click()
    _wait(browser, lambda: "per 15 min" in _text(browser, "#spend figcaption"))
    assert browser.current_url.endswith("?window=24h")


@pytest.mark.parametrize("width", [320, 390, 768])
def test_it_fits_a_phone(browser: webdriver.Chrome, busy: Running, width: int) -> None:
    """Nothing is wider than the screen, and nothing that is meant to be read is tiny."""
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        _open(browser, busy)
        _wait(browser, lambda: "old-or-new" in _text(browser, "#experiments"))
        assert browser.execute_script("return document.documentElement.scrollWidth;") == width
        script = """
            const svg = document.querySelector("#quality svg");
            return svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
        """
        assert browser.execute_script(script) >= 0.85, "the plot's text would be unreadable"
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_it_follows_the_colour_scheme(browser: webdriver.Chrome, busy: Running) -> None:
    """Dark is dark and light is light, and text keeps its contrast in both."""
    seen = {}
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        _open(browser, busy)
        _wait(browser, lambda: _tile(browser, "Requests"))
        script = """
            const luminance = (css) => {
              const channels = css.match(/[0-9.]+/g).slice(0, 3).map((c) => c / 255);
              const linear = channels.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
              return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
            };
            const ground = luminance(getComputedStyle(document.querySelector(".tile")).backgroundColor);
            const texts = [...document.querySelectorAll(".tile *, #mix *, #state, button")];
            const ratios = texts.filter((e) => e.textContent && !e.matches("[aria-pressed=true], [type=submit]"))
              .map((e) => luminance(getComputedStyle(e).color))
              .map((text) => (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05));
            return [ground, Math.min(...ratios)];
        """  # noqa: E501
        seen[scheme] = browser.execute_script(script)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert seen["light"][0] > 0.8
    assert seen["dark"][0] < 0.05
    assert min(seen["light"][1], seen["dark"][1]) >= 4.5, "WCAG AA"


def test_policies_answer_side_by_side(browser: webdriver.Chrome, busy: Running) -> None:
    """Each chosen name streams its answer with who, why and what it cost; it can be rated."""
    _open(browser, busy)
    _wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#chat .chips label"))
    chips = browser.find_elements(By.CSS_SELECTOR, "#chat .chips input")
    names = [chip.get_attribute("value") for chip in chips]
    assert {"auto", "policy/both", "alpha"} <= set(names)
    for chip in chips:
        wanted = chip.get_attribute("value") in {"policy/both", "alpha"}
        if chip.is_selected() != wanted:
            browser.execute_script("arguments[0].click();", chip)
    question = browser.find_element(By.ID, "question")
    question.clear()
    question.send_keys(HOSTILE, Keys.ENTER)
    _wait(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, ".answer dl dt")) >= 12)
    cards = browser.find_elements(By.CSS_SELECTOR, "#chat .answer")
    assert [card.find_element(By.TAG_NAME, "h3").text for card in cards] == ["policy/both", "alpha"]
    for card in cards:
        assert HOSTILE in card.find_element(By.CSS_SELECTOR, ".text").text, "shown as text"
        assert "cost" in card.text
    assert "alpha 50%, beta 50%" in cards[0].text
    assert browser.title == "Shoal", "what an answer says is never run"
    cards[1].find_element(By.CSS_SELECTOR, ".rating button").click()
    _wait(browser, lambda: "Rated good." in cards[1].text)
    assert not _errors(browser)


def test_no_more_than_four_can_be_chosen(browser: webdriver.Chrome, busy: Running) -> None:
    """With four chosen the others cannot be."""
    _open(browser, busy)
    _wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#chat .chips label"))
    for chip in browser.find_elements(By.CSS_SELECTOR, "#chat .chips input"):
        if not chip.is_selected():
            browser.execute_script("arguments[0].click();", chip)
    chosen = browser.find_elements(By.CSS_SELECTOR, "#chat .chips input:checked")
    assert len(chosen) == 4
    assert browser.find_elements(By.CSS_SELECTOR, "#chat .chips input:disabled")


def test_it_asks_for_a_key_where_one_is_needed(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """Nothing is shown without an admin's key; the right one lasts a reload, until forgotten."""
    with _serving(tmp_path, auth={"required": True}) as server:
        database = open_database(f"sqlite:///{tmp_path / 'shoal.db'}")
        _, admin = create_key(database, name="boss", scope="admin")
        _, user = create_key(database, name="guest")
        database.dispose()

        def enter(key: str) -> None:
            field = browser.find_element(By.ID, "key")
            field.clear()
            field.send_keys(key, Keys.ENTER)

        _open(browser, server)
        _wait(browser, lambda: browser.find_element(By.ID, "login").is_displayed())
        assert not browser.find_element(By.ID, "dashboard").is_displayed()
        enter(user)
        _wait(browser, lambda: "not an admin's" in _text(browser, "#refusal"))
        enter(admin)
        _wait(browser, lambda: _tile(browser, "Requests") == "0")
        assert not browser.find_element(By.ID, "login").is_displayed()
        browser.refresh()
        _wait(browser, lambda: _tile(browser, "Requests") == "0")
        # The chat box sends the key too.
        browser.find_element(By.CSS_SELECTOR, "#chat button[type=submit]").click()
        _wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".answer dl dt"))
        browser.find_element(By.ID, "forget").click()
        _wait(browser, lambda: browser.find_element(By.ID, "login").is_displayed())
        _errors(browser)  # refusals are logged by the browser itself


def test_it_says_when_the_server_is_gone(browser: webdriver.Chrome, tmp_path: Path) -> None:
    """Figures stay on the screen, with their age."""
    with _serving(tmp_path, dashboard={"access": "loopback"}) as server:
        _open(browser, server)
        _wait(browser, lambda: _tile(browser, "Requests") == "0")
    _wait(browser, lambda: "does not answer, as of" in _text(browser, "#state"))
    assert _tile(browser, "Requests") == "0"


def test_an_experiment_says_what_its_report_says(tmp_path: Path, browser: webdriver.Chrome) -> None:
    """Verdict, split, effects, intervals, segments and guardrails are those of the API."""
    config = {"dashboard": {"access": "loopback"}, "experiments": {"old-or-new": EXPERIMENT}}
    with _serving(tmp_path, **config) as server:
        for number in range(160):
            answer = server.post(model="auto").json()
            dear = answer["shoal"]["members"] == ["alpha"]
            score = {"id": answer["id"], "score": float(dear or number % 3 == 0)}
            server.http.post("/v1/feedback", json=score)
        _open(browser, server)
        _wait(browser, lambda: "160 requests" in _text(browser, "#experiments"))
        told = server.http.get("/v1/experiments/old-or-new").json()
        shown = _text(browser, "#experiments article")
        badge = _text(browser, "#experiments .badge")
        cells = _cells(browser, "#experiments")
    [quality], [usd] = told["primary"], told["secondary"]
    assert (told["verdict"], badge.lower()) == ("ship", "ship")
    assert told["recommendation"] in shown
    assert "split as planned" in shown
    by_metric = {row[1]: row for row in cells if row[0] == "new"}
    for effect in (quality, usd):
        shown_effect = by_metric[effect["metric"]][2].split()[0]
        assert float(shown_effect) == pytest.approx(effect["estimate"], rel=6e-3)
    low, high = (float(end) for end in by_metric["quality"][3].strip("[]").split(", "))
    assert (low, high) == pytest.approx((quality["low"], quality["high"]), rel=6e-3)
    assert quality["estimate"] > 0.3
    [part] = {effect["part"] for effect in told["segments"]}
    assert f"quality, length {part}" in by_metric
    assert by_metric["error_rate (guardrail)"][2:4] == ["holds", "limit 0.02"]


def test_a_target_is_tried_before_it_is_set(tmp_path: Path, browser: webdriver.Chrome) -> None:
    """The form's answer: the sentence, a line per domain and one of all; or why there is none."""

    def simulate(amount: str) -> None:
        field = browser.find_element(By.ID, "amount")
        field.clear()
        field.send_keys(amount)
        browser.find_element(By.CSS_SELECTOR, "#resource option[value='usd']").click()
        browser.find_element(By.CSS_SELECTOR, "#target button").click()

    with _serving(tmp_path, dashboard={"access": "loopback"}) as server:
        _open(browser, server)
        _wait(browser, lambda: _tile(browser, "Requests") == "0")
        simulate("1")
        _wait(browser, lambda: "there is nothing to simulate" in _text(browser, "#target"))
        for number in range(200):
            row = record(
                number,
                time_s=time.time() - 36 * number,
                scores={"alpha": 0.9, "beta": 0.85 - 0.6 * (number % 2)},
                plan={"answer": {"members": ["alpha", "beta"]}},
                members={name: MemberTokens(output_tokens=20) for name in ("alpha", "beta")},
                usd=1.2e-4,
                costs={"alpha": Cost(usd=4e-5), "beta": Cost(usd=8e-5)},
            )
            server.ledger.record(row)
        asyncio.run_coroutine_threadsafe(server.ledger.flush(), server.loop).result(60)
        simulate("0.005")
        _wait(browser, lambda: "these 200 requests" in _text(browser, "#target"))
        asked = {"amount": "0.005", "resource": "usd", "per": "hour"}
        told = server.http.get("/dashboard/target", params=asked).json()
        cells = _cells(browser, "#target")
    assert "would get fewer members" in told["sentence"]
    assert told["sentence"] in _text(browser, "#target")
    assert [row[0] for row in cells] == [*told["domains"], "all"]
    assert cells[-1][1] == "200"
    assert float(cells[-1][5]) == pytest.approx(told["total"]["under"]["usd"], rel=6e-3)
    assert told["total"]["under"]["usd"] < 0.7 * told["total"]["was"]["usd"]
