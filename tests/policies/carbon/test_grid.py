"""The grid's intensity: tables, schedules, and how long a live reading is trusted."""

import pytest

from policies.carbon.grid import (
    GRID_FOLDER,
    CachedGrid,
    GridReading,
    ScheduledGrid,
    StaticGrid,
    find_zone,
    load_zones,
    may_wait,
)
from policies.errors import CarbonError


@pytest.mark.parametrize(
    ("key", "gco2e_per_kwh"),
    [
        ("DE", 380.9),
        ("deu", 380.9),
        ("gcp:us-central1", 412.72),
        ("aws:eu-north-1", 8.0),
        ("azure:westeurope", 390.0),
        ("WORLD", 480.6),
    ],
)
def test_zones_are_found_by_country_code_and_cloud_region(key, gco2e_per_kwh):
    """Two- and three-letter codes and cloud regions, whatever their case."""
    assert find_zone(key).gco2e_per_kwh == gco2e_per_kwh


def test_every_shipped_intensity_is_plausible():
    """No negative value and none above an old coal fleet; licences stand beside."""
    zones = load_zones()
    assert len(zones) > 450
    assert all(0 <= zone.gco2e_per_kwh < 1400 for zone in zones.values())
    assert len(list(GRID_FOLDER.glob("LICENSE.*"))) == 3


@pytest.mark.parametrize(
    ("key", "message"),
    [("Atlantis", "ISO country codes"), ("gcp:moon", "gcp regions are gcp:africa-south1")],
)
def test_unknown_zones_are_refused_with_what_is_allowed(key, message):
    """The error lists the regions of the cloud that was meant, or the kinds of names."""
    with pytest.raises(CarbonError, match=message):
        find_zone(key)


def test_a_daily_profile_repeats(tmp_path):
    """Hours are UTC; before the first one yesterday's last value holds."""
    file = tmp_path / "day.csv"
    file.write_text("hour,gco2e_per_kwh\n18,500\n6,100\n")
    grid = ScheduledGrid.read(file)
    day = 20 * 86400
    assert [grid.at(day + hour * 3600).gco2e_per_kwh for hour in (3, 6, 17.9, 18, 27)] == [
        500,
        100,
        100,
        500,
        500,
    ]
    assert grid.at(day).source == "file:day.csv"


def test_a_time_series_holds_each_value_until_the_next(tmp_path):
    """ISO times, UTC where no offset is named; the first value also holds before it."""
    file = tmp_path / "series.csv"
    file.write_text("time,gco2e_per_kwh\n2026-01-01T00:00:00,300\n2026-01-01T02:00:00+01:00,200\n")
    grid = ScheduledGrid.read(file)
    start = 1767225600
    assert [grid.at(start + s).gco2e_per_kwh for s in (-50, 0, 3599, 3600, 9e9)] == [
        300,
        300,
        300,
        200,
        200,
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("hour,intensity\n1,2\n", "needs rows under the columns"),
        ("", "needs rows under the columns"),
        ("hour,gco2e_per_kwh\n1,much\n", "line 2: could not convert"),
        ("hour,gco2e_per_kwh\n1,3\n24,3\n", r"line 3: an hour is in \[0, 24"),
        ("hour,gco2e_per_kwh\n1,-3\n", "line 2: gco2e_per_kwh must be a number >= 0"),
        ("hour,gco2e_per_kwh\n1,nan\n", "line 2: gco2e_per_kwh must be a number >= 0"),
        ("hour,gco2e_per_kwh\n1,3\n1,4\n", "line 3: 1 is there twice"),
        (
            "time,gco2e_per_kwh\n2026-10-25T02:00,3\n2026-10-25T02:00,4\n",
            "line 3: 2026-10-25T02:00 is there twice; times are UTC unless they name an offset",
        ),
        ("time,gco2e_per_kwh\nyesterday,3\n", "line 2: Invalid isoformat"),
    ],
)
def test_a_bad_grid_file_is_refused(tmp_path, content, message):
    """The error names the file, the line and what is allowed."""
    file = tmp_path / "grid.csv"
    file.write_text(content)
    with pytest.raises(CarbonError, match=message):
        ScheduledGrid.read(file)


def test_a_live_reading_is_trusted_until_it_is_stale():
    """Before any reading and after the limit the fallback answers, and says so."""
    grid = CachedGrid(fallback=StaticGrid.of_zone("DE"), max_age_s=100)
    assert grid.at(0).source == "fallback:DE"
    grid.update(GridReading(gco2e_per_kwh=50, source="live:DE"), measured_s=1000)
    assert grid.at(1100) == GridReading(gco2e_per_kwh=50, source="live:DE")
    stale = grid.at(1101)
    assert (stale.gco2e_per_kwh, stale.source) == (380.9, "fallback:DE")


def test_an_older_reading_does_not_replace_a_newer_one():
    """Feeds may answer out of order."""
    grid = CachedGrid(fallback=StaticGrid.of_zone("DE"), max_age_s=100)
    grid.update(GridReading(gco2e_per_kwh=50, source="live:DE"), measured_s=1000)
    grid.update(GridReading(gco2e_per_kwh=70, source="live:DE"), measured_s=900)
    assert grid.at(1000).gco2e_per_kwh == 50


def test_a_schedule_announces_what_is_to_come(tmp_path):
    """A file knows the hours to come, also behind a live feed; a year's mean announces nothing."""
    file = tmp_path / "profile.csv"
    file.write_text("hour,gco2e_per_kwh\n0,300\n12,100\n")
    profile = ScheduledGrid.read(file)
    assert profile.announced(5 * 86_400 + 13 * 3600) == 100
    assert CachedGrid(fallback=profile, max_age_s=100).announced(13 * 3600) == 100
    series = ScheduledGrid([0.0, 3600.0, 7200.0], [5.0, 6.0, 7.0], source="file:x")
    assert [series.announced(then_s) for then_s in (10, 3700, 7200)] == [5, 6, None]
    assert StaticGrid.of_zone("DE").announced(0) is None


def hours(*values):
    """Announce a value per hour from time zero on, and nothing beyond."""
    return lambda then_s: values[int(then_s // 3600)] if then_s < 3600 * len(values) else None


@pytest.mark.parametrize(
    ("announced", "work_h", "waits"),
    [
        (hours(3, 1, 3, 3), 0.5, True),  # one hour is better, and enough with the margin
        (hours(3, 1, 3, 3), 1, False),  # an hour and a half needs one of the others too
        (hours(2, 1, 1, 3), 1, True),
        (hours(1, 2, 3, 4), 1, False),  # it is now that is best
        (hours(2, 2, 2, 2), 1, False),  # nothing is better
        (hours(9, 1, 1, 1), 3, False),  # there is no time to lose
        (hours(9, 1), 1, False),  # what comes after is not announced
        (lambda then_s: None, 1, False),
        (hours(9, 1, 1, 1), 0, False),
    ],
)
def test_work_waits_for_hours_that_suffice(announced, work_h, waits):
    """Due in four hours: it goes on in the cheapest ones that are enough for 1.5 times the work."""
    assert may_wait(announced, now_s=0.0, until_s=4 * 3600, work_s=work_h * 3600) is waits


def test_the_hour_that_comes_twice_in_autumn_is_two_hours(tmp_path):
    """Local times with their offsets: clocks are put back from summer time in between."""
    file = tmp_path / "series.csv"
    rows = ("2026-10-25T02:00+02:00,3", "2026-10-25T02:00+01:00,4", "2026-10-25T03:00+01:00,5")
    file.write_text("\n".join(("time,gco2e_per_kwh", *rows)))
    grid, midnight_s = ScheduledGrid.read(file), 1_792_886_400
    assert [grid.at(midnight_s + hour * 3600).gco2e_per_kwh for hour in (0, 1, 2)] == [3, 4, 5]


def test_a_tariff_is_read_like_a_grid(tmp_path):
    """Prices have a column of their own, and may be negative."""
    file = tmp_path / "tariff.csv"
    file.write_text("hour,usd_per_kwh\n0,0.3\n12,-0.1\n")
    tariff = ScheduledGrid.read(file, column="usd_per_kwh")
    assert [tariff.announced(hour * 3600) for hour in (1, 13, 30)] == [0.3, -0.1, 0.3]
    with pytest.raises(CarbonError, match="hour,usd_per_kwh"):
        file.write_text("hour,gco2e_per_kwh\n0,300\n")
        ScheduledGrid.read(file, column="usd_per_kwh")
