"""Cap names, windows, headers and configuration."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from pydantic import ValidationError

from policies.footprint import Cost
from router.access.limits import (
    CAP_NAMES,
    SERVER,
    Amounts,
    BudgetsConfig,
    CapError,
    Limit,
    duration,
    limits,
    rate_limit_headers,
    read_caps,
    to_text,
    window,
)


def _time_s(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("period", "start", "end"),
    [
        ("minute", "2024-02-29T23:59:00", "2024-03-01T00:00:00"),
        ("hour", "2024-02-29T23:00:00", "2024-03-01T00:00:00"),
        ("day", "2024-02-29T00:00:00", "2024-03-01T00:00:00"),
        ("month", "2024-02-01T00:00:00", "2024-03-01T00:00:00"),
    ],
)
def test_windows_are_those_of_the_utc_calendar(period: str, start: str, end: str) -> None:
    """A window begins and ends where the calendar's does, on a leap day too, without gaps."""
    found = window("key_a", period, _time_s("2024-02-29T23:59:30.5"))
    assert (found.start_s, found.end_s) == (_time_s(start), _time_s(end))
    after = window("key_a", period, found.end_s)
    assert after.start_s == found.end_s and after.id != found.id
    assert window("key_a", period, found.end_s - 0.001) == found


def test_months_end_where_the_year_does() -> None:
    """December's window ends at the new year."""
    found = window(SERVER, "month", _time_s("2026-12-31T23:59:59"))
    assert found.end_s == _time_s("2027-01-01T00:00:00")


def test_every_cap_name_is_read() -> None:
    """All twenty names work; money, energy and carbon count in billionths."""
    caps = read_caps(dict.fromkeys(CAP_NAMES, 1.5), "test")
    assert len(caps) == 20
    assert tuple(cap.name for cap in caps) == CAP_NAMES
    assert {cap.resource: cap.limit for cap in caps} == {
        "requests": 2,
        "tokens": 2,
        "usd": 1_500_000_000,
        "wh": 1_500_000_000,
        "gco2e": 1_500_000_000,
    }
    opened = limits("key_a", caps, 0.0)
    assert [limit.window.scope for limit in opened] == ["key_a"] * 20


@pytest.mark.parametrize(
    ("caps", "message"),
    [
        ({"usd_per_week": 1}, "test: 'usd_per_week' is unknown; allowed are requests_per_minute"),
        ({"usd_per_day": -1}, "between 0 and"),
        ({"usd_per_day": float("nan")}, "between 0 and"),
        ({"usd_per_day": "5"}, "'5' is not a number"),
        ({"usd_per_day": True}, "True is not a number"),
    ],
)
def test_bad_caps_are_named(caps: dict[str, float], message: str) -> None:
    """A cap that cannot be read says which, its value and what is allowed."""
    with pytest.raises(CapError, match=message):
        read_caps(caps, "test")


def test_a_keys_own_cap_replaces_the_default_of_that_name() -> None:
    """Caps for every key apply but where a key has one of that name."""
    config = BudgetsConfig(per_key={"usd_per_day": 1, "requests_per_minute": 10})
    own = read_caps({"usd_per_day": 5}, "test")
    assert {cap.name: cap.limit for cap in config.key_caps(own)} == {
        "usd_per_day": 5_000_000_000,
        "requests_per_minute": 10,
    }
    for bad in ({"server": {"usd": 1}}, {"per_kee": {}}, {"wait_s": -1}):
        with pytest.raises(ValidationError):
            BudgetsConfig.model_validate(bad)


def test_amounts_round_up() -> None:
    """A cost below a billionth still counts, so that no cap leaks by rounding."""
    found = Amounts.of(tokens=3, cost=Cost(usd=1e-12, wh=0.0, gco2e=2e-9))
    assert found == Amounts(1, 3, 1, 0, 2)
    assert to_text("usd", 30_500_000) == "0.0305 USD"
    assert to_text("tokens", 12) == "12 tokens"


def test_headers_name_the_tightest_limit() -> None:
    """Of several limits on tokens the one with the least left is shown."""
    now_s = _time_s("2026-11-22T10:00:30")
    caps = read_caps({"tokens_per_minute": 100, "tokens_per_day": 1000, "usd_per_day": 1}, "test")
    minute, day, usd = limits("key_a", caps, now_s)
    assert rate_limit_headers([(minute, 60), (day, 40), (usd, 1)], now_s) == {
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "40",
        "x-ratelimit-reset-tokens": "13h59m30s",
    }
    assert rate_limit_headers([(minute, 7)], now_s)["x-ratelimit-reset-tokens"] == "30s"
    assert isinstance(minute, Limit)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (-3, "0ms"), (0.85, "850ms"), (1, "1s"), (360, "6m0s"), (10812, "3h0m12s")],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, text: str) -> None:
    """Reset times use OpenAI's notation."""
    assert duration(seconds) == text
