"""Shadow traffic: the share that is mirrored, and a cap that holds."""

from __future__ import annotations

import pytest

from policies.errors import ExperimentError
from policies.experiments.shadow import Shadow, ShadowMeter, read_shadows


def meter(**changes: float) -> ShadowMeter:
    """A meter for 0.1 USD a day with two at a time."""
    settings = {"share": 1.0, "usd_per_day": 0.1, "concurrency": 2, **changes}
    return ShadowMeter(Shadow(name="s", policy="new", **settings))  # type: ignore[arg-type]


def ask(
    m: ShadowMeter, i: int = 0, *, usd: float = 0.01, day: int = 1, model: str = "auto"
) -> bool:
    """Ask to mirror request `i`."""
    wanted = m.wants(f"r{i}", model=model)
    return wanted and m.admit(estimate_usd=usd, now_s=day * 86_400.0)


def test_the_share_is_mirrored() -> None:
    """About a quarter of 4,000 requests, always the same ones (4 sigma: 0.027)."""
    m = meter(share=0.25, usd_per_day=1e9, concurrency=10_000)
    chosen = [ask(m, i) for i in range(4000)]
    assert abs(sum(chosen) / 4000 - 0.25) < 0.028
    again = meter(share=0.25, usd_per_day=1e9, concurrency=10_000)
    assert [ask(again, i) for i in range(4000)] == chosen


def test_the_cap_holds_with_reservations() -> None:
    """Spent plus reserved never exceeds the day's cap; the next day starts anew."""
    m = meter()
    spent = 0.0
    for i in range(50):
        if ask(m, i):
            m.settle(estimate_usd=0.01, usd=0.009)
            spent += 0.009
    assert 0.09 < spent <= 0.1
    assert m.spent_today_usd == pytest.approx(spent)
    assert ask(m, day=2)
    assert m.spent_today_usd == 0


def test_processes_share_the_cap_and_remember_the_day() -> None:
    """Four processes get a quarter each, less what was spent today; tomorrow it starts anew."""
    shadow = Shadow(name="s", policy="new", share=1.0, usd_per_day=0.4, concurrency=9)
    m = ShadowMeter(shadow, num_processes=4, spent_usd=0.36, now_s=86_400.0)
    assert [ask(m, usd=0.01) for _ in range(2)] == [True, False]
    m.settle(estimate_usd=0.01, usd=0.01)
    assert [ask(m, usd=0.06, day=2) for _ in range(2)] == [True, False]


def test_only_so_many_run_at_once() -> None:
    """A third one is skipped while two run, and admitted after one has ended."""
    m = meter()
    assert [ask(m, i) for i in range(3)] == [True, True, False]
    m.settle(estimate_usd=0.01, usd=0.0)
    assert ask(m, 3)


def test_only_the_named_models_are_mirrored() -> None:
    """A client that names a model itself is not mirrored."""
    assert not ask(meter(), model="policy/base")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"share": 0.0}, r"shadows\.s\.share: 0\.0 is refused: it should be greater than 0"),
        ({"usd_per_day": -1.0}, r"shadows\.s\.usd_per_day: -1\.0"),
        ({"concurrency": 0}, r"shadows\.s\.concurrency: 0"),
    ],
)
def test_bad_settings_are_refused(bad: dict[str, float], words: str) -> None:
    """The message names the key and the value."""
    sound = {"policy": "new", "share": 0.5, "usd_per_day": 1.0}
    with pytest.raises(ExperimentError, match=words):
        read_shadows({"s": {**sound, **bad}}, policies=["new"])
