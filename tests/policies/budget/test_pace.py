"""Forecasts of the rest of a window, from today and from the days before."""

import numpy as np
import pytest

from policies.budget.prices import Pace

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


def clean_noon(now_s):
    """Return the intensity of a grid that is clean from 10 to 16 h."""
    return 100.0 if 10 <= (now_s % DAY_S) / 3600 < 16 else 400.0


def test_a_cold_start_extends_the_rate_so_far():
    """Without a day before, what was even so far is expected to go on."""
    pace = Pace(window_s=DAY_S)
    live_through(pace, np.arange(0, 6 * 3600, 60.0))
    rest = pace.rest(6 * 3600.0)
    assert rest.requests == pytest.approx(18 * 60, rel=0.01)
    assert rest.dirty_requests == pytest.approx(rest.requests)
    assert rest.share == pytest.approx(0.75)
    assert not rest.known


def test_an_announced_rhythm_of_the_grid_needs_no_first_day():
    """A file's hours are known beforehand; today's level is taken to stay relative to them."""
    pace = Pace(window_s=DAY_S, announced=clean_noon)
    live_through(pace, np.arange(0, 3600, 60.0), lambda now_s: 2 * clean_noon(now_s))
    rest = pace.rest(3600.0)
    # Seen from a dirty hour, six of the 23 to come cost a quarter.
    assert rest.dirty_requests / rest.requests == pytest.approx((17 + 6 / 4) / 23)
    unknown = Pace(window_s=DAY_S, announced=lambda then_s: None)
    live_through(unknown, np.arange(0, 3600, 60.0))
    assert unknown.rest(3600.0).dirty_requests == pytest.approx(unknown.rest(3600.0).requests)


def test_a_burst_is_expected_to_pass():
    """An hour of ten times the traffic hardly raises what is expected of the evening."""
    pace = Pace(window_s=DAY_S)
    live_through(pace, np.arange(0, DAY_S, 60.0))
    noon_s = DAY_S + 12 * 3600
    live_through(pace, np.arange(DAY_S, noon_s, 60.0))
    live_through(pace, np.arange(noon_s, noon_s + 3600, 6.0))
    assert 11 * 60 < pace.rest(noon_s + 3600).requests < 1.25 * 11 * 60


def test_yesterday_s_burst_does_not_recur_at_once():
    """What came within a minute is spread over its hour."""
    pace = Pace(window_s=DAY_S)
    live_through(pace, np.sort(np.r_[np.arange(0, DAY_S, 60.0), np.linspace(36_000, 36_060, 600)]))
    live_through(pace, np.arange(DAY_S, DAY_S + 36_000, 60.0))
    soon = pace.rest(DAY_S + 36_000).requests - pace.rest(DAY_S + 36_900).requests
    assert 15 + 600 / 6 < soon < 15 + 600 / 4


def test_a_start_in_mid_window_counts_from_there():
    """The rate is judged over the time that was seen, not over the whole day."""
    pace = Pace(window_s=DAY_S)
    live_through(pace, np.arange(12 * 3600.0, 13 * 3600.0, 60.0))
    assert pace.started_s == 12 * 3600.0
    assert pace.rest(13 * 3600.0).requests == pytest.approx(11 * 60, rel=0.02)


def test_requests_that_others_saw_count_from_their_first():
    """A record of four hours before this process started quarters the rate it would believe."""
    pace = Pace(window_s=DAY_S)
    live_through(pace, np.arange(12 * 3600.0, 13 * 3600.0, 60.0))
    pace.reconcile(13 * 3600.0, num_requests=75, first_request_s=8 * 3600.0)
    assert pace.num_requests == 75
    assert pace.rest(13 * 3600.0).requests == pytest.approx(11 * 15, rel=0.02)


def test_yesterday_tells_how_much_of_today_is_to_come():
    """At 8 h a fifth of the traffic's night part is over and the whole busy day to come."""
    pace = Pace(window_s=DAY_S)
    live_through(pace, day_and_night(0.0))
    today = day_and_night(DAY_S)
    now_s = DAY_S + 8 * 3600
    live_through(pace, today[today < now_s])
    assert pace.rest(now_s).known
    assert pace.rest(now_s).requests == pytest.approx(1800, rel=0.08)


def test_a_busier_day_raises_the_forecast():
    """With twice yesterday's traffic so far, more is expected, though not yet twice as much."""
    pace = Pace(window_s=DAY_S)
    live_through(pace, day_and_night(0.0))
    busy = day_and_night(DAY_S, num=4000)
    now_s = DAY_S + 14 * 3600
    live_through(pace, busy[busy < now_s])
    assert 1000 * 1.15 < pace.rest(now_s).requests < 1000 * 2.0


def test_at_least_the_request_that_is_answered_is_to_come():
    """In a window's last second there is no division by nothing."""
    pace = Pace(window_s=DAY_S)
    live_through(pace, np.arange(0, DAY_S, 60.0))
    assert pace.rest(DAY_S - 1).requests == 1.0


def test_the_grids_rhythm_is_learned_too():
    """At midnight, yesterday's clean midday is expected to come back, relative to now."""
    pace = Pace(window_s=DAY_S)
    live_through(pace, np.arange(0, DAY_S + 120, 60.0), clean_noon)
    rest = pace.rest(DAY_S + 120)
    assert rest.dirty_requests / rest.requests == pytest.approx((18 + 6 / 4) / 24, rel=0.01)


def test_a_dirtier_grid_is_taken_to_stay_dirtier():
    """After a step the rhythm is yesterday's on today's level, not a return to yesterday."""
    pace = Pace(window_s=DAY_S)
    times_s = np.arange(0, DAY_S + 3600, 60.0)
    live_through(pace, times_s, lambda now_s: 900.0 if now_s >= DAY_S else 300.0)
    rest = pace.rest(DAY_S + 3600)
    assert rest.dirty_requests == pytest.approx(rest.requests)


def test_a_day_seen_in_part_teaches_no_rhythm():
    """A service started at noon knows nothing of mornings: the next day starts cold again."""
    pace = Pace(window_s=DAY_S)
    live_through(pace, np.arange(12 * 3600.0, DAY_S + 3600, 60.0))
    assert pace.num_requests == 60
    assert not pace.rest(DAY_S + 3600).known
    assert pace.rest(DAY_S + 3600).requests == pytest.approx(23 * 60, rel=0.02)
