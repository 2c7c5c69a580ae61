"""Forecasts of the rest of the window, from today and from the days before."""

import numpy as np
import pytest

from policies.budget.pace import Pace

DAY_S = 86_400.0


def live_through(pace, times_s, intensity=lambda now_s: 300.0):
    """Count a request at each time."""
    for now_s in times_s:
        pace.count(now_s, intensity=intensity(now_s))


def day_and_night(start_s, num=2000):
    """Return times with four times the traffic from 8 to 20 h."""
    day = np.linspace(8 * 3600, 20 * 3600, num * 8 // 10, endpoint=False)
    night = np.r_[
        np.linspace(0, 8 * 3600, num // 10, endpoint=False),
        np.linspace(20 * 3600, DAY_S, num // 10, endpoint=False),
    ]
    return start_s + np.sort(np.r_[day, night])


def test_a_cold_start_extends_the_rate_so_far():
    """Without a day before, what was even so far is expected to go on, and perhaps to grow."""
    pace = Pace(window_s=DAY_S)
    live_through(pace, np.arange(0, 6 * 3600, 60.0))
    assert 18 * 60 < pace.horizon(6 * 3600.0).num_requests < 1.4 * 18 * 60


@pytest.mark.parametrize("peak_h", [6, 18])
def test_a_cold_start_learns_the_rhythm_while_it_lasts(peak_h):
    """Half a day into a first day with one peak, the forecast is better than a flat one."""
    seconds = np.arange(0, DAY_S, 10.0)
    rate = 1 + 0.6 * np.cos(2 * np.pi * (seconds / DAY_S - peak_h / 24))
    arrivals = seconds[np.diff(np.floor(np.cumsum(rate) * 0.5), prepend=0) > 0]
    pace = Pace(window_s=DAY_S)
    noon_s = DAY_S / 2
    live_through(pace, arrivals[arrivals < noon_s])
    so_far, to_come = (arrivals < noon_s).sum(), (arrivals >= noon_s).sum()
    error = abs(np.log(pace.horizon(noon_s).num_requests / to_come))
    assert error < 0.9 * abs(np.log(so_far / to_come))


def test_a_first_day_is_taken_to_be_of_a_likely_size():
    """From the same quiet or busy first hour, the forecast is drawn to what targets make likely."""
    for per_hour, closer in ((30, "more"), (600, "less")):
        pace = Pace(window_s=DAY_S)
        live_through(pace, np.arange(0, 3600.0, 3600 / per_hour))
        free = pace.horizon(3600.0).num_requests
        drawn = pace.horizon(3600.0, likely=(1500.0, 6000.0)).num_requests
        assert drawn > 1.3 * free if closer == "more" else drawn < 0.8 * free


def test_a_first_day_s_size_is_soon_seen():
    """By the evening of an even day, what was likely hardly matters any more."""
    pace = Pace(window_s=DAY_S)
    live_through(pace, np.arange(0, 18 * 3600.0, 60.0))
    [low, high] = [
        pace.horizon(18 * 3600.0, likely=likely).num_requests
        for likely in ((200.0, 800.0), (3000.0, 12_000.0))
    ]
    assert 0.5 * 360 < low < high < 2 * 360


def test_an_announced_rhythm_of_the_grid_needs_no_first_day():
    """A file's hours are known beforehand; today's level is taken to stay relative to them."""

    def announced(then_s):
        return 100.0 if 10 <= (then_s % DAY_S) / 3600 < 16 else 400.0

    pace = Pace(window_s=DAY_S, announced=announced)
    live_through(pace, np.arange(0, 120, 60.0), lambda now_s: 800.0)
    horizon = pace.horizon(120.0)
    assert horizon.intensity[0] == pytest.approx(1.0)
    assert horizon.intensity[12 * 4] == pytest.approx(0.25)
    unknown = Pace(window_s=DAY_S, announced=lambda then_s: None)
    live_through(unknown, np.arange(0, 120, 60.0))
    assert (unknown.horizon(120.0).intensity == 1.0).all()


def test_a_burst_is_expected_to_pass():
    """An hour of ten times the traffic hardly raises what is expected of the evening.

    While it lasts, it is expected to go on for a while.
    """
    pace = Pace(window_s=DAY_S)
    live_through(pace, np.arange(0, DAY_S, 60.0))
    noon_s = DAY_S + 12 * 3600
    live_through(pace, np.arange(DAY_S, noon_s, 60.0))
    before = pace.horizon(noon_s)
    live_through(pace, np.arange(noon_s, noon_s + 3600, 6.0))
    during = pace.horizon(noon_s + 3600)
    assert during.requests[1] > 4 * before.requests[1]
    evening = slice(28, 40)  # seven hours later
    assert during.requests[evening].sum() < 1.25 * before.requests[evening].sum()


def test_a_start_in_mid_window_counts_from_there():
    """The rate is judged over the time that was seen, not over the whole day."""
    pace = Pace(window_s=DAY_S)
    live_through(pace, np.arange(12 * 3600.0, 13 * 3600.0, 60.0))
    assert pace.elapsed_s == pytest.approx(3600, rel=0.02)
    assert 11 * 60 < pace.horizon(13 * 3600.0).num_requests < 2 * 11 * 60


def test_yesterday_tells_how_much_of_today_is_to_come():
    """At 8 h a fifth of the traffic's night part is over and the whole busy day to come."""
    pace = Pace(window_s=DAY_S)
    live_through(pace, day_and_night(0.0))
    today = day_and_night(DAY_S)
    now_s = DAY_S + 8 * 3600
    live_through(pace, today[today < now_s])
    assert pace.horizon(now_s).num_requests == pytest.approx(1800, rel=0.08)


def test_a_busier_day_raises_the_forecast():
    """With twice yesterday's traffic so far, more is expected, though not yet twice as much."""
    pace = Pace(window_s=DAY_S)
    live_through(pace, day_and_night(0.0))
    busy = day_and_night(DAY_S, num=4000)
    now_s = DAY_S + 14 * 3600
    live_through(pace, busy[busy < now_s])
    assert 1000 * 1.4 < pace.horizon(now_s).num_requests < 1000 * 2.0


def test_the_forecast_reaches_into_the_next_window():
    """In a window's last minutes the horizon goes on, and says how much of it is beyond."""
    pace = Pace(window_s=DAY_S)
    live_through(pace, np.arange(0, DAY_S - 300, 60.0))
    horizon = pace.horizon(DAY_S - 300)
    assert horizon.seconds == pytest.approx(300)
    assert horizon.num_requests == pytest.approx(15, rel=0.2)
    assert horizon.beyond == pytest.approx(10 / 1440, rel=0.2)


def test_the_grids_rhythm_is_learned_too():
    """At midnight, yesterday's clean midday is expected to come back, relative to now."""

    def intensity(now_s):
        return 100.0 if 10 <= (now_s % DAY_S) / 3600 < 16 else 400.0

    pace = Pace(window_s=DAY_S)
    live_through(pace, np.arange(0, DAY_S + 120, 60.0), intensity)
    horizon = pace.horizon(DAY_S + 120)
    assert horizon.intensity[0] == pytest.approx(1.0)
    assert horizon.intensity[12 * 4] == pytest.approx(0.25)


def test_a_dirtier_grid_is_taken_to_stay_dirtier():
    """After a step the rhythm is yesterday's on today's level, not a return to yesterday."""

    def intensity(now_s):
        return 900.0 if now_s >= DAY_S else 300.0

    pace = Pace(window_s=DAY_S)
    live_through(pace, np.arange(0, DAY_S + 3600, 60.0), intensity)
    assert (pace.horizon(DAY_S + 3600).intensity == 1.0).all()


def test_a_day_seen_in_part_teaches_no_rhythm():
    """A service started at noon knows nothing of mornings: the next day starts cold again."""
    pace = Pace(window_s=DAY_S)
    live_through(pace, np.arange(12 * 3600.0, DAY_S + 3600, 60.0))
    assert pace.num_requests == 60
    assert 23 * 60 < pace.horizon(DAY_S + 3600).num_requests < 2 * 23 * 60
